"""Studies without models: cells whose truth is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from prunescope.analysis import schema
from prunescope.analysis.studies import LABELS
from prunescope.analysis.summary import figures

METHODS = ("attn-drop", "magnitude", "wanda", "rtn", "gptq")
QUANTIZED = ("rtn", "gptq")


def study(
    cells: int = 60,
    drives: str | None = "output_kl",
    seed: int = 0,
    noise: float = 0.05,
    models: int = 1,
) -> xr.Dataset:
    """Independent figures, of which one alone decides what is kept (none: nothing does)."""
    rng = np.random.default_rng(seed)
    values = {name: np.exp(rng.normal(-1, 1.5, cells)) for name in figures()}
    cause = values[drives] if drives else np.exp(rng.normal(-1, 1.5, cells))
    kept = 1 / (1 + (cause / 0.4) ** 2)
    for name in ("retention_generation", "retention_choice"):
        values[name] = kept + noise * rng.normal(size=cells)
        values[f"{name}_low"], values[f"{name}_high"] = values[name] - 0.04, values[name] + 0.04
    values["compression"] = rng.uniform(0.05, 0.9, cells)
    method = np.array(METHODS)[np.arange(cells) % len(METHODS)]
    labels = {
        "model": np.array([f"model {i % models}" for i in range(cells)]), "method": method,
        "recipe": np.array([f"{m}@{i}" for i, m in enumerate(method)]), "amount": np.array([str(i) for i in range(cells)]),
        "ranking": np.full(cells, ""), "seed": np.full(cells, -1), "count": np.full(cells, 0),
        "kind": np.where(np.isin(method, QUANTIZED), "quantization", "pruning"),
        "file": np.array([f"{i}.nc" for i in range(cells)]),
    }  # fmt: skip
    return xr.Dataset(
        {k: ("cell", v) for k, v in values.items()},
        coords={k: ("cell", v) for k, v in labels.items()},
    )


def write(data: xr.Dataset, folder: Path, **told: Any) -> None:
    """Every cell as a file with its `/summary` alone, as a sweep leaves them; `told` are root attributes."""
    names = [str(n) for n in data.data_vars]
    table = np.stack([data[n].values for n in names], -1)
    labels = {n: data[n].values for n in LABELS}
    for i, row in enumerate(table):
        attrs = {n: v[i].item() for n, v in labels.items()}
        group = schema.dataset("summary", {"value": row}, {"figure": names}, attrs)
        schema.write(
            schema.tree({"summary": group}, {"recipe": attrs["recipe"], **told}),
            folder / "model" / "cells" / f"{i}.nc",
        )
