"""What every figure is made with: a picture with its texts, the style, names as file names."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xarray as xr
from matplotlib.figure import Figure

STYLE: Any = {
    "font.family": "sans-serif", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "figure.facecolor": "white", "svg.fonttype": "path", "svg.hashsalt": "prunescope",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A drawn figure: file name, image data, caption, and the text for those who cannot see it."""

    name: str
    svg: bytes
    caption: str
    alternative: str

    @property
    def uri(self) -> str:
        """As a data URI for an `img`."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg).decode()


def finish(name: str, figure: Figure, caption: str, alternative: str) -> Picture:
    """A picture of a figure, the same bytes for the same data."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return Picture(name, buffer.getvalue(), caption, alternative)


def having(cells: Mapping[str, xr.DataTree], group: str) -> dict[str, xr.Dataset]:
    """The cells that have a group, with it."""
    return {name: c[group].to_dataset() for name, c in cells.items() if group in c.children}


def safe(name: str) -> str:
    """A cell's name as part of a file name."""
    return "".join(c if c.isalnum() or c in "-." else "-" for c in name)
