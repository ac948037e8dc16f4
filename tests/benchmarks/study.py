"""A study of 10,000 cells with no model inside: scheduled, stored, opened, correlated.

python -m tests.benchmarks.study [--cells 10000]
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import synthetic
from prunescope.analysis import correlation, open_study, schema
from prunescope.analysis.studies import LABELS
from prunescope.reports.engines import Trouble
from prunescope.reports.progress import Progress
from prunescope.reports.request import Plan, Request
from prunescope.reports.sweep import sweep


class Writer:
    """A worker that writes what the truth says a cell holds, and nothing else."""

    def __init__(self, truth: Any) -> None:
        names = [str(n) for n in truth.data_vars]
        self.names, self.table = names, np.stack([truth[n].values for n in names], -1)
        self.labels = {n: truth[n].values for n in LABELS}

    def do(self, what: Plan, name: str | None) -> Trouble | None:
        if name is not None:
            i = int(name.rpartition("@")[2])
            attrs = {n: v[i].item() for n, v in self.labels.items()}
            group = schema.dataset(
                "summary", {"value": self.table[i]}, {"figure": self.names}, attrs
            )
            schema.write(schema.tree({"summary": group}, {"recipe": name}), what.cell(name))
        return None

    def close(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=10_000)
    count = parser.parse_args().cells
    truth = synthetic.study(cells=count, models=4)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        plans = {
            m: plan(m, truth, Path(folder) / m) for m in sorted(set(truth.model.values.tolist()))
        }
        with Progress() as progress:
            progress.say = lambda _line: None  # type: ignore[method-assign]
            assert sweep(plans, [lambda: Writer(truth)], progress) == []
        made = time.perf_counter()
        study = open_study(folder)
        opened = time.perf_counter()
        assert study.sizes["cell"] == count
        ranked = correlation.links(study, "retention_generation")
        done = time.perf_counter()
    assert ranked[0].figure == "output_kl"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"| {count} cells: scheduled and stored {made - start:.0f} s, opened {opened - made:.0f} s, "
        f"{len(ranked)} figures correlated {done - opened:.0f} s | {done - start:.0f} s | {peak:.2f} GB |"
    )


def plan(model: str, truth: Any, folder: Path) -> Plan:
    mine = truth.recipe.values[truth.model.values == model].tolist()
    return Plan(Request(model, tuple(mine)), folder, {}, (), (), None, {})


if __name__ == "__main__":
    main()
