"""One cell in a row of numbers: what a study compares and correlates over its cells."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from . import collapse, schema
from .finding import accomplished, group
from .statistics import interval

DRAWS = 500
BITS = 16.0  # of a weight that nothing was done to, whatever it is held in while measured
FORMATS = ("choice", "generation", "last word")


class Figure(NamedTuple):
    """A figure of a shift: the space it is taken in, and what is measured in words."""

    space: str
    describe: str


FIGURES: dict[str, Figure] = {
    "angular_h": Figure("h", "1 − cos of hidden states"),
    "orthogonal_h": Figure("h", "change across the hidden state"),
    "angular_z": Figure("z", "1 − cos of logits"),
    "var_p": Figure("z", "Var_p[Δz]"),
    "var_r": Figure("z", "Var_r[Δz]"),
    "var_uniform": Figure("z", "Var[Δz] over the vocabulary"),
    "angular_p": Figure("p", "1 − cos of probabilities"),
    "kl": Figure("p", "KL(p‖p′)"),
    "kl_reverse": Figure("p", "KL(p′‖p)"),
    "tv": Figure("p", "total variation"),
    "flip": Figure("p", "most likely token differs"),
}

PLACES: dict[str, str] = {
    "output": "at the output", "local": "of a sublayer on dense input",
    "propagated": "along the layers", "step": "of one decoding step", "forced": "on the dense text",
}  # fmt: skip
"""Where a figure is taken. `output` needs one pass over the prompts and nothing else."""

SUBSPACE: dict[str, Figure] = {
    "subspace_options_kl": Figure("p", "KL over the options"),
    "subspace_options_angular": Figure("z", "1 − cos of the options' logits"),
    "subspace_top_kl": Figure("p", "KL over the ten likeliest tokens"),
    "subspace_disagree": Figure("p", "another option is chosen"),
}


def figures() -> dict[str, Figure]:
    """Every figure that a study correlates with retention, by its name."""
    spread = {
        f"{place}_{name}": Figure(f.space, f"{f.describe} {where}")
        for place, where in PLACES.items() for name, f in FIGURES.items()
    }  # fmt: skip
    return spread | SUBSPACE


def summarise(cell: xr.DataTree) -> xr.Dataset:
    """The group `/summary`: `value` of every figure that the cell has, with who and what as attributes.

    Means over prompts of means over positions; retention is the mean over the tasks of a format on which
    the dense model is above chance, with a 95 % interval over items.
    """
    values = {**_shifts(cell), **_options(cell), **_retention(cell), **_cost(cell), **_shape(cell)}
    attrs = {
        "model": str(cell.attrs.get("model", "")), "recipe": str(cell.attrs.get("recipe", "")),
        **described(str(cell.attrs.get("recipe", "")), accomplished(cell)),
    }  # fmt: skip
    numbers = np.array(list(values.values()), float)
    return schema.dataset("summary", {"value": numbers}, {"figure": list(values)}, attrs)


def described(recipe: str, achieved: dict[str, Any]) -> dict[str, Any]:
    """Method, amount, ranking and seed as a recipe's text tells them, and its kind.

    >>> described("attn-drop@5-kl", {"dropped": {}})["ranking"]
    'kl'
    """
    steps = [part.partition("@") for part in recipe.split("+")]
    seeds = re.findall(r"seed=(\d+)", recipe)
    match = re.match(r"(\d+)(?:-(kl|var-r|angular))?(-iterative)?$", steps[0][2])
    dropped = len(steps) == 1 and match is not None
    pruned = any(achieved.get(k) for k in ("dropped", "removed", "kept", "sparsity", "neurons"))
    kinds = [k for k, there in (("pruning", pruned), ("quantization", "bits" in achieved)) if there]
    return {
        "method": "+".join(step[0] for step in steps),
        "amount": "+".join(re.sub(r",?seed=\d+", "", step[2]) for step in steps),
        "ranking": (match[2] or "cosine") + (match[3] or "") if dropped and match else "",
        "count": int(match[1]) if dropped and match else 0,
        "seed": int(seeds[0]) if seeds else -1,
        "kind": " and ".join(kinds) or "other",
    }


def _shifts(cell: xr.DataTree) -> dict[str, float]:
    found: dict[str, float] = {}
    for place in PLACES:
        data = _at(cell, place)
        if data is not None:
            for name in FIGURES:
                figure, _, space = name.rpartition("_")
                spaced = space in schema.SPACES and figure in data
                if spaced:
                    values: Any = data[figure].sel(space=space)
                elif name in data:
                    values = data[name]
                else:
                    continue
                found[f"{place}_{name}"] = _mean(values)
    return found


def _at(cell: xr.DataTree, place: str) -> xr.Dataset | None:
    if place == "output":
        return group(cell, "output")
    name, dim = ("shifts", "effect") if place in schema.EFFECTS else ("steps", "history")
    data = group(cell, name)
    return data.sel({dim: place}) if data is not None and place in data[dim].values else None


def _mean(values: xr.DataArray) -> float:
    """Over everything; each prompt counts alike."""
    inner = [d for d in values.dims if d != "prompt"]
    return float(values.astype("float64").mean(inner, skipna=True).mean("prompt", skipna=True))


def _options(cell: xr.DataTree) -> dict[str, float]:
    data = group(cell, "subspace")
    if data is None:
        return {}
    options = data.sel(subset="options")
    return {
        "subspace_options_kl": float(options.kl.mean()),
        "subspace_options_angular": float(1 - options.cosine.sel(subspace="z").mean()),
        "subspace_top_kl": float(data.kl.sel(subset="top").mean()),
        "subspace_disagree": float(1 - data.agree.mean()),
    }


def _retention(cell: xr.DataTree) -> dict[str, float]:
    scores = group(cell, "scores")
    if scores is None:
        return {}
    chance = scores.chance.values.astype(float)
    sides = [
        scores.score.sel(model=m).values.astype(float) - chance for m in ("candidate", "dense")
    ]
    found: dict[str, float] = {}
    tasks = collapse.informative(scores)
    for format in FORMATS:
        pairs = [(sides[0][i], sides[1][i]) for (_, f), i in tasks.items() if f == format]
        if pairs:
            span = interval(*collapse.mean_retention(pairs, range(len(pairs)), DRAWS))
            name = "retention_" + format.replace(" ", "_")
            found |= dict(zip((name, f"{name}_low", f"{name}_high"), span, strict=True))
    return found


def _cost(cell: xr.DataTree) -> dict[str, float]:
    data = group(cell, "cost")
    if data is None:
        return {}
    bits = accomplished(cell).get("bits_stored")
    sides = [
        stored({str(n): float(v.sel(model=m)) for n, v in data.data_vars.items() if v.dims == ("model",)},
               bits if m == "candidate" else None)
        for m in schema.MODELS
    ]  # fmt: skip
    found = {"compression": 1 - sides[1] / sides[0], "stored_bytes": sides[1]}
    for name in ("prefill_rate", "decode_rate"):
        if name in data:
            dense, other = (data[name].sel(model=m).values for m in schema.MODELS)
            found[name.replace("rate", "speed")] = float(np.median(other / dense))
    if "peak_bytes" in data:
        found["peak_memory"] = float(data.peak_bytes[1] / data.peak_bytes[0])
    return found


def stored(cost: dict[str, float], bits: float | None) -> float:
    """Bytes of a model as it would be stored: 16 bits a weight, rounded ones with their scales in
    `bits`, and where many are zero only the others with a mask of one bit for each.
    """
    weights, held = cost["parameters"], cost["bytes"] / cost["parameters"]
    small = 0.0
    if bits is not None and cost["bytes_packed"] < cost["bytes"]:
        small = (cost["bytes"] - cost["bytes_packed"]) / max(held - bits / 8, 1e-9)
    plain = (weights - small) * BITS / 8 + small * (bits or 0.0) / 8
    sparse = cost["nonzero"] * BITS / 8 + weights / 8
    return sparse if small == 0 and sparse < plain else plain


def _shape(cell: xr.DataTree) -> dict[str, float]:
    data = group(cell, "shape")
    if data is None:
        return {}
    means = {f"shape_{n}": _mean(data[n]) for n in ("kurtosis", "common", "along")}
    shares = data.spectrum.values[data.spectrum.values > 0].astype(float)
    return means | {
        "shape_first": float(data.spectrum.max()),
        "shape_rank": float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else float("nan"),
    }  # fmt: skip
