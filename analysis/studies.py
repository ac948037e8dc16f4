"""Reading a study: one dataset over all of its cells, or one group of them all, lazily."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from . import schema
from .places import opened, place
from .summary import summarise

LABELS = ("model", "recipe", "method", "amount", "ranking", "kind", "seed", "count")
"""Coordinates of a study's cells, beside `file`."""


def open_study(folder: Path | str, group: str | None = None) -> xr.Dataset:
    """The cells of a study as one dataset along `cell`.

    Args:
        folder: what `sweep`, `diagnose` or `compare` wrote.
        group: a group of the schema, as `output`: every cell's, put one after the other and read only
            where it is computed with (needs dask: `pip install prunescope[studies]`). None: one number
            of each figure per cell (`retention_generation`, `output_kl`, …), read at once;
            `.to_dataframe()` makes a table of it.

    Returns:
        Variables along `cell`, whose coordinates are `LABELS` and the cell's `file`. What a cell does
        not have is NaN.

    Raises:
        SchemaError: no finished cell there, or one that cannot be read.
    """
    files = finished(place(folder))
    if not files:
        raise schema.SchemaError(f"{folder}: no finished cell; `prunescope sweep` makes them")
    rows = [_summary(file) for file in files]
    labels = {n: ("cell", np.array([row.attrs[n] for row in rows])) for n in LABELS}
    labels["file"] = ("cell", np.array([str(f) for f in files]))
    if group is not None:
        return _combined(files, group).assign_coords(labels)
    names = list(dict.fromkeys(str(n) for row in rows for n in row.figure.values))
    table = {name: np.full(len(rows), np.nan) for name in names}
    for i, row in enumerate(rows):
        for name, value in zip(row.figure.values, row.value.values, strict=True):
            table[str(name)][i] = value
    return xr.Dataset({name: ("cell", values) for name, values in table.items()}, coords=labels)


def finished(folder: Path) -> list[Path]:
    """Files of the finished cells of one study or of a sweep, in a fixed order."""
    return sorted([*folder.glob("cells/[!.]*.nc"), *folder.glob("*/cells/[!.]*.nc")])


def _summary(file: Path) -> xr.Dataset:
    """As the cell tells it; made from its groups where an older one does not."""
    try:
        return schema.read_group(file, "summary")
    except schema.SchemaError:
        return summarise(schema.read(file))


def _combined(files: list[Path], group: str) -> xr.Dataset:
    if group not in schema.SCHEMA:
        raise schema.SchemaError(f"{group!r} is no group: {', '.join(schema.SCHEMA)}")
    options: dict[str, Any] = {
        "combine_attrs": "drop_conflicts",
        "join": "outer",
        "coords": "minimal",
    }
    return xr.open_mfdataset(
        [opened(file) for file in files], group=f"/{group}", engine="h5netcdf", combine="nested", concat_dim="cell",
        data_vars="all", compat="override", **options,
    )  # fmt: skip
