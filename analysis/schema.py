"""The data schema: every group, dimension and variable, declared once.

One `xarray.DataTree` per cell, one netCDF file, readable with plain xarray. What is written and
what is read is checked against this table, so that a file with this schema version means one thing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from .places import beside, opened

VERSION = "1"
H = "arXiv 2603.24652"
N = "arXiv 2604.27115"


class SchemaError(ValueError):
    """Data that do not follow the schema; the message names the group, the variable and the rule."""


@dataclass(frozen=True)
class Variable:
    """One variable: dimensions, unit, what it is, where it is defined, and the kind of its values."""

    dims: tuple[str, ...]
    units: str
    long_name: str
    reference: str = "prunescope README, Measurements"
    kind: str = "f"  # numpy kind: f float, i integer, b boolean, U text


_POSITION = ("prompt", "token")
_STEP = ("prompt", "step")
_HISTORY = (*_STEP, "history")
_SITE = ("prompt", "token", "layer", "site", "effect")


def _figures(dims: tuple[str, ...]) -> dict[str, Variable]:
    space = (*dims, "space")
    return {
        "cosine": Variable(space, "1", "cosine similarity of x and x'", H),
        "angular": Variable(space, "1", "1 - cosine, without cancellation", H),
        "parallel": Variable(space, "1", "change along x, relative to the norm of x", H),
        "orthogonal": Variable(space, "1", "change across x, relative to the norm of x", H),
        "kl": Variable(dims, "nat", "KL(p || p')", H),
        "kl_reverse": Variable(dims, "nat", "KL(p' || p)"),
        "js": Variable(dims, "nat", "Jensen-Shannon divergence of p and p'"),
        "tv": Variable(dims, "1", "total variation of p and p'"),
        "var_p": Variable(dims, "nat2", "variance of dz under p", H),
        "var_r": Variable(dims, "nat2", "variance of dz under r = p^2/sum p^2", H),
        "var_uniform": Variable(dims, "nat2", "variance of dz over the vocabulary"),
        "third_cumulant": Variable(dims, "nat3", "third cumulant of dz under p"),
        "validity": Variable(dims, "1", "|k3|/(3 k2 T): third order of KL beside the second"),
        "flip": Variable(dims, "1", "1 where the most likely token differs"),
        "margin": Variable(dims, "nat", "largest minus second largest dense logit"),
        "overlap": Variable(
            dims, "1", "share of the dense top 10 that the candidate's top 10 keep"
        ),
        "entropy": Variable(dims, "nat", "entropy of p"),
        "entropy_candidate": Variable(dims, "nat", "entropy of p'"),
    }


def _histories() -> dict[str, Variable]:
    figures = _figures(_HISTORY)
    names = (
        "cosine", "angular", "kl", "kl_reverse", "js", "tv", "var_p", "var_r", "flip",
        "entropy_candidate",
    )  # fmt: skip
    return {name: figures[name] for name in names}


def _patched(prefix: str, *dims: str) -> dict[str, Variable]:
    whole = ("prompt", *dims)
    return {
        f"{prefix}kl": Variable(whole, "nat", "mean KL(p || p') over the positions asked about"),
        f"{prefix}flip": Variable(whole, "1", "share of them whose most likely token differs"),
        f"{prefix}log_p": Variable(whole, "nat", "log p' of the answer"),
    }


SCHEMA: dict[str, dict[str, Variable]] = {
    "shifts": _figures(_SITE),
    "output": _figures(_POSITION),
    "shape": {
        "kurtosis": Variable(_POSITION, "1", "excess kurtosis of dz over the vocabulary"),
        "common": Variable(
            _POSITION,
            "1",
            "share of |dz|^2 that is one shift common to all tokens (no effect on p)",
        ),
        "along": Variable(
            _POSITION, "1", "cosine of dz and z, each without its mean: -1 flattens, 1 sharpens"
        ),
        "spectrum": Variable(
            ("component",), "1", "share of |dz|^2, common shift left out, in each direction"
        ),
    },
    "summary": {
        "value": Variable(
            ("figure",), "", "one number of each figure of the cell, as studies use it"
        ),
    },
    "scores": {
        "score": Variable(("item", "model"), "1", "1 right, 0 wrong"),
        "no_answer": Variable(("item", "model"), "1", "1 where nothing could be read as an answer"),
        "no_stop": Variable(("item", "model"), "1", "1 where the length limit ended the text"),
        "repetition": Variable(
            ("item", "model"), "1", "share of 4-grams of tokens that are repeats"
        ),
        "f1": Variable(("item", "model"), "1", "word overlap with the nearest accepted answer"),
        "log_p": Variable(("item", "model"), "nat", "log-likelihood of the right answer"),
        "text": Variable(
            ("item", "model"), "", "what the model wrote, or the option it chose", kind="U"
        ),
    },
    "subspace": {
        "cosine": Variable(("item", "subset", "subspace"), "1", "cosine of z and of p"),
        "kl": Variable(("item", "subset"), "nat", "KL(p || p') over the subset, renormalised"),
        "mass": Variable(("item", "model"), "1", "probability that falls on the options"),
        "margin": Variable(("item",), "nat", "largest minus second largest dense option logit"),
        "gain": Variable(
            ("item",), "nat", "most that an option gains on the dense choice, dz_c - dz_top"
        ),
        "agree": Variable(("item",), "1", "1 where both choose the same option"),
        "stable": Variable(("item",), "1", "1 where gain < margin: the choice cannot change"),
    },
    "perplexity": {
        "kl": Variable(("token",), "nat", "KL(p || p') where the token is predicted"),
        "log_p": Variable(("token", "model"), "nat", "log-probability of the token"),
        "flip": Variable(("token",), "1", "1 where the most likely token differs"),
    },
    "retrieval": {
        "ndcg": Variable(("query", "model"), "1", "nDCG@10"),
        "recall": Variable(("query", "model"), "1", "recall@10"),
    },
    "similarity": {
        "cosine": Variable(("pair", "model"), "1", "cosine of the two sentences' vectors"),
        "gold": Variable(("pair",), "1", "similarity as people judged it"),
    },
    "steps": {
        **_histories(),
        "margin": _figures(_STEP)["margin"],
        "entropy": _figures(_STEP)["entropy"],
        "token": Variable((*_STEP, "model"), "1", "token that was written; -1: ended", kind="i"),
        "token_text": Variable((*_STEP, "model"), "", "the token as text", kind="U"),
        "text": Variable(("prompt", "model"), "", "what the model wrote", kind="U"),
        "prompt_text": Variable(("prompt",), "", "the prompt", kind="U"),
        "no_stop": Variable(("prompt", "model"), "1", "1 where the limit of steps ended the text"),
    },
    "temperatures": {
        name: figure
        for name, figure in _figures((*_HISTORY, "temperature")).items()
        if name in ("kl", "kl_reverse", "tv", "var_p", "entropy_candidate")
    },
    "patches": {
        **_patched(""),
        **_patched("depth_", "layer", "span"),
        **_patched("swap_", "layer", "site", "swap"),
        **_patched("part_", "part"),
        "part_share": Variable(("prompt", "part"), "1", "share of the squared change of h or z"),
        "log_p_dense": Variable(("prompt",), "nat", "log p of the answer"),
        "changed": Variable(("layer", "site"), "1", "1 where the sublayers differ", kind="i"),
        "prompt_text": Variable(("prompt",), "", "the prompt", kind="U"),
        "answer": Variable(("prompt",), "", "what should follow it", kind="U"),
    },
    "memory": {
        "kl": Variable(
            ("prompt", "cut"),
            "nat",
            "mean KL(p || p') of the steps of the dense text, where the "
            "candidate reads dense keys and values in its first `cut` layers, its own in the others",
        ),
        "flip": Variable(
            ("prompt", "cut"), "1", "share of the steps whose likeliest token differs"
        ),
    },
    "repairs": {
        "score": Variable(("item", "arm"), "1", "1 right, 0 wrong, with some sublayers given back"),
    },
    "neurons": {
        "activation": Variable(
            ("layer", "neuron", "texts"), "1", "mean |act(gate) up|, over tokens, then items", N
        ),
        "spread": Variable(
            ("layer", "neuron", "texts"), "1", "standard deviation of it over items"
        ),
        "selectivity": Variable(
            ("layer", "neuron", "metric"), "1", "how much more the target task excites it", N
        ),
        "salience": Variable(
            ("layer", "neuron"), "1", "target activation times the norm of what it writes"
        ),
        "kept": Variable(("layer", "neuron"), "1", "1 where it stays, 0 where it was cut"),
    },
    "cost": {
        "parameters": Variable(("model",), "1", "parameters, shared ones once"),
        "nonzero": Variable(("model",), "1", "parameters that are not zero"),
        "bytes": Variable(("model",), "byte", "weights as held in memory"),
        "bytes_packed": Variable(
            ("model",), "byte", "weights as a packed integer format would store them"
        ),
        "prefill_rate": Variable(
            ("round", "model"), "token/s", "tokens read per second, models in turn"
        ),
        "decode_rate": Variable(
            ("round", "model"), "token/s", "tokens written per second, models in turn"
        ),
        "peak_bytes": Variable(
            ("model",), "byte", "weights and tensors alive at once while texts are read"
        ),
        "seconds": Variable(("work",), "s", "wall-clock seconds of the cell's parts"),
    },
}
"""group -> variable -> declaration. A new measurement is one row here."""

SPACES = ("h", "z", "p")
SITES = ("attn", "mlp")
EFFECTS = ("local", "propagated")
HISTORIES = ("step", "forced", "free", "swapped")
MODELS = ("dense", "candidate")
SUBSETS = ("options", "top", "whole")
TEXTS = ("target", "control")  # that neurons are ranked by
SPANS = ("all", "last")  # dense states at all positions, or only where the answer is predicted
SWAPS = ("denoise", "noise")  # a dense sublayer in the candidate, and the other way round
PARTS = ("parallel", "orthogonal", "common", "rest", "top", "tail")


def dataset(
    group: str,
    variables: Mapping[str, np.ndarray],
    coords: Mapping[str, Any],
    attrs: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """A dataset of one group, with the declared attributes on every variable, checked.

    Args:
        group: name in `SCHEMA`.
        variables: arrays in the order of the declared dimensions.
        coords: coordinates; a `(dim, values)` pair where the name is not the dimension.
        attrs: attributes of the group; what is not text or number is kept as JSON.

    Raises:
        SchemaError: a variable that is not declared, or of the wrong shape or kind.
    """
    declared = SCHEMA[group]
    data: dict[str, Any] = {}
    for name, values in variables.items():
        if name not in declared:
            raise SchemaError(f"/{group}/{name} is not declared; known: {', '.join(declared)}")
        row = declared[name]
        about = {"units": row.units, "long_name": row.long_name, "reference": row.reference}
        data[name] = (row.dims, np.asarray(values), about)
    result = xr.Dataset(
        data, coords=dict(coords), attrs={k: _plain(v) for k, v in (attrs or {}).items()}
    )
    check_group(group, result)
    return result


def check_group(group: str, data: xr.Dataset) -> None:
    """Check one group against its declaration.

    Raises:
        SchemaError: an unknown variable, or dimensions or values of the wrong kind.
    """
    declared = SCHEMA.get(group)
    if declared is None:
        raise SchemaError(f"/{group} is not a group of the schema: {', '.join(SCHEMA)}")
    for name, values in data.data_vars.items():
        row = declared.get(str(name))
        if row is None:
            raise SchemaError(f"/{group}/{name} is not declared; known: {', '.join(declared)}")
        if tuple(values.dims) != row.dims:
            raise SchemaError(f"/{group}/{name} has dims {values.dims}, declared {row.dims}")
        kind = values.dtype.kind
        if (
            kind != row.kind
            and not (row.kind == "U" and kind in "OTS")
            and not (row.kind == "f" and kind in "ib")
        ):
            raise SchemaError(f"/{group}/{name} holds {values.dtype}, declared kind {row.kind!r}")


def tree(groups: Mapping[str, xr.Dataset], attrs: Mapping[str, Any]) -> xr.DataTree:
    """One cell: groups and provenance, stamped with the schema version."""
    root = xr.Dataset(attrs={"schema": VERSION, **{k: _plain(v) for k, v in attrs.items()}})
    return xr.DataTree.from_dict({"/": root, **{f"/{name}": data for name, data in groups.items()}})


def write(cell: xr.DataTree, path: Path) -> None:
    """Write a cell, beside its place first and then renamed: a file that is there is complete."""
    for name, node in cell.children.items():
        check_group(name, node.to_dataset())
    with beside(path) as scratch:
        cell.to_netcdf(scratch, engine="h5netcdf", encoding=_encoding(cell))


def _encoding(cell: xr.DataTree) -> dict[str, dict[str, Any]]:
    def packed(data: xr.Dataset) -> dict[str, Any]:
        return {
            str(n): {"zlib": True, "complevel": 4}
            for n, v in data.data_vars.items()
            if v.dtype.kind in "fib" and v.ndim
        }

    return {f"/{name}": packed(node.to_dataset()) for name, node in cell.children.items()}


def read(path: Path) -> xr.DataTree:
    """Read a cell into memory and check it.

    Raises:
        SchemaError: no netCDF file, or one of another schema version.
    """
    try:
        with xr.open_datatree(opened(path), engine="h5netcdf") as there:
            cell = there.load()
    except (OSError, ValueError) as error:
        raise SchemaError(f"{path}: cannot be read as netCDF ({error})") from error
    version = cell.attrs.get("schema")
    if str(version) != VERSION:
        raise SchemaError(f"{path}: schema version {version!r}, this prunescope reads {VERSION!r}")
    for name, node in cell.children.items():
        check_group(name, node.to_dataset())
    return cell


def read_group(path: Path, group: str) -> xr.Dataset:
    """Read one group of a cell into memory, and nothing else of it.

    Raises:
        SchemaError: no netCDF file, or one without this group.
    """
    try:
        with xr.open_dataset(opened(path), group=f"/{group}", engine="h5netcdf") as there:
            return there.load()
    except (OSError, ValueError) as error:
        raise SchemaError(f"{path}: /{group} cannot be read ({error})") from error


def read_attributes(path: Path) -> dict[str, Any]:
    """Who made a cell, of what and how: the attributes of its root."""
    with xr.open_dataset(opened(path), engine="h5netcdf") as root:
        return {str(k): v.item() if isinstance(v, np.generic) else v for k, v in root.attrs.items()}


def _plain(value: Any) -> Any:
    plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    return value if plain else json.dumps(value, sort_keys=True)
