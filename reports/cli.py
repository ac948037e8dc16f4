"""The command line."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..analysis.schema import SCHEMA, SchemaError
from ..probes.recipe import METHODS, Recipe, RecipeError
from .progress import Progress, hush

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Explains why a compressed language model fails: what broke, where, and how sure that is.",
)  # fmt: skip

EPILOG = "Exit status: 0 done, 2 unusable arguments or input, 1 failure, 130 interrupted."

ModelArg = Annotated[
    str, typer.Argument(help="Hub id, folder, .gguf file, or smollm2 (the default).")
]
OutOption = Annotated[
    Path, typer.Option("--out", help="Folder for the results; the same command resumes there.")
]
TasksOption = Annotated[
    str,
    typer.Option("--tasks", help="Tasks, comma-separated (default: all twins; see `list tasks`)."),
]
DataOption = Annotated[
    Path | None, typer.Option("--data", help="Folder with NAME.jsonl task files.")
]
PromptsOption = Annotated[
    Path | None,
    typer.Option("--prompts", help="Text file, one prompt a line, to measure shifts on."),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="Texts for ranking and calibration: a file (one a line, or .jsonl rows with `text`), or a "
        "dataset as NAME:CONFIG:SPLIT, whose first 128 rows are streamed.",
    ),
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", help="Items per task, drawn with the seed (default: all).")
]
StepsOption = Annotated[int, typer.Option("--steps", help="Tokens that both models write.")]
CausesOption = Annotated[
    int,
    typer.Option("--causes", help="Items on which each layer's share of the damage is looked for."),
]
RepairOption = Annotated[
    int,
    typer.Option(
        "--repair", help="Sublayers to give back, those blamed most, and see what is written again."
    ),
]
ChatOption = Annotated[
    bool, typer.Option("--chat", help="Ask what is answered in writing through the chat template.")
]
CodeOption = Annotated[
    bool,
    typer.Option(
        "--allow-code-execution", help="Run the programs that the models write, in a sandbox."
    ),
]
SampledOption = Annotated[
    bool,
    typer.Option(
        "--sampled/--greedy", help="Draw the tokens at --temperature, or take the likeliest."
    ),
]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", help="Softmax temperature T of the figures.")
]
UnscoredOption = Annotated[
    int,
    typer.Option(
        "--limit",
        help="Items of a task that a study with this --limit scores: left out of the texts that rank or train.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of whatever is drawn.")]
LensOption = Annotated[
    str, typer.Option("--lens", help="Readout of inner layers: norm (final norm) or raw.")
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
DeviceOption = Annotated[
    str,
    typer.Option("--device", help="Torch device, as cpu or cuda:0; auto spreads a model over all."),
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]
RecipeOption = Annotated[
    list[str],
    typer.Option("--recipe", "-r", help="What to do, as mlp-drop@3; repeat for more cells."),
]


@app.command(epilog=EPILOG)
def diagnose(
    out: OutOption,
    recipe: RecipeOption,
    model: ModelArg = "smollm2",
    tasks: TasksOption = "",
    data: DataOption = None,
    prompts: PromptsOption = None,
    calibration: CalibrationOption = None,
    limit: LimitOption = None,
    steps: StepsOption = 32,
    sampled: SampledOption = False,
    temperature: TemperatureOption = 1.0,
    causes: CausesOption = 16,
    repair: RepairOption = 0,
    chat: ChatOption = False,
    allow_code_execution: CodeOption = False,
    seed: SeedOption = 24652,
    lens: LensOption = "norm",
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    trust_remote_code: TrustOption = False,
) -> None:
    """Compress MODEL by each recipe, compare it with itself, and write the report."""
    options: dict[str, Any] = {
        "model": model, "recipes": tuple(str(Recipe.parse(r)) for r in recipe), "tasks": _names(tasks),
        "data": data, "prompts": prompts, "calibration": calibration, "limit": limit, "steps": steps, "sampled": sampled, "temperature": temperature,
        "causes": causes, "repair": repair, "chat": chat, "allow_code_execution": allow_code_execution, "seed": seed, "lens": lens, "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    _study(options, out)


@app.command(epilog=EPILOG)
def compare(
    out: OutOption,
    dense: Annotated[
        str, typer.Argument(help="The dense model: hub id, folder, .gguf file or smollm2.")
    ],
    candidate: Annotated[list[str], typer.Argument(help="Compressed forms of it, each a cell.")],
    tasks: TasksOption = "",
    data: DataOption = None,
    prompts: PromptsOption = None,
    limit: LimitOption = None,
    steps: StepsOption = 32,
    sampled: SampledOption = False,
    temperature: TemperatureOption = 1.0,
    causes: CausesOption = 16,
    repair: RepairOption = 0,
    chat: ChatOption = False,
    allow_code_execution: CodeOption = False,
    seed: SeedOption = 24652,
    lens: LensOption = "norm",
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    trust_remote_code: TrustOption = False,
) -> None:
    """Compare DENSE with checkpoints that were compressed elsewhere, on the same footing."""
    options: dict[str, Any] = {
        "model": dense, "candidates": tuple(candidate), "tasks": _names(tasks),
        "data": data, "prompts": prompts, "limit": limit, "steps": steps, "sampled": sampled, "temperature": temperature,
        "causes": causes, "repair": repair, "chat": chat, "allow_code_execution": allow_code_execution, "seed": seed, "lens": lens, "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    _study(options, out)


@app.command(epilog=EPILOG)
def compress(
    out: Annotated[Path, typer.Option("--out", help="New folder for the candidate.")],
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="What to do, as attn-drop@4+rtn@int4-g64.")
    ],
    model: ModelArg = "smollm2",
    calibration: CalibrationOption = None,
    limit: UnscoredOption = 40,
    data: DataOption = None,
    seed: SeedOption = 24652,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    trust_remote_code: TrustOption = False,
) -> None:
    """Compress MODEL and save the candidate, with a note on how it loads back."""
    from ..probes import compress as carry_out
    from ..probes import load, save
    from ..probes.compress import check, cost, ranked_by
    from ..probes.load import exists
    from ..probes.save import check_target
    from .request import read_calibration, unscored

    what = Recipe.parse(recipe)
    exists(model)
    texts, ranking = read_calibration(calibration), unscored(ranked_by(what), data, limit, seed)
    check_target(out)
    with Progress() as progress:
        with progress.task(f"loading {model}"):
            dense = load(
                model,
                dtype=dtype,
                device=device,
                trust_remote_code=trust_remote_code,
                say=progress.say,
            )
        check(dense, what)
        with progress.task(f"{what}") as tick:
            candidate = carry_out(
                dense, what, calibration=texts, ranking=ranking, seed=seed, progress=tick
            )
        with progress.task(f"saving to {out}"):
            save(candidate, out)
        own, made = cost(dense), cost(candidate)
        progress.say(
            f"{candidate.label}: {made['parameters'] / own['parameters']:.1%} of the parameters, "
            f"{1 - made['nonzero'] / made['parameters']:.1%} of them zero; packed "
            f"{made['bytes_packed'] / own['bytes_packed']:.1%} of the bytes; saved in {out}"
        )


@app.command(epilog=EPILOG)
def recover(
    candidate: Annotated[
        str,
        typer.Argument(help="What to train: a saved candidate, or the dense model as a control."),
    ],
    on: Annotated[
        str,
        typer.Option("--on", help="Task whose items to train on, or a file with one text a line."),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", help="New folder for what comes of it; the same command resumes."),
    ],
    method: Annotated[
        str,
        typer.Option(
            "--method", help="lora, full; scale (one factor a sublayer) or temperature (one)."
        ),
    ] = "lora",
    steps: Annotated[int, typer.Option("--steps", help="Steps of 8 texts, at most.")] = 100,
    limit: UnscoredOption = 40,
    data: DataOption = None,
    seed: SeedOption = 24652,
    device: DeviceOption = "cpu",
    trust_remote_code: TrustOption = False,
) -> None:
    """Train CANDIDATE on a task or texts, masks kept, and save it, to be compared with the rest."""
    from ..probes import load, save
    from ..probes.load import exists
    from ..probes.recover import Training, check
    from ..probes.recover import recover as train
    from ..probes.save import check_target
    from .request import training_texts

    exists(candidate)
    check_target(out)
    texts, training = training_texts(on, data, limit, seed), Training(method, steps, seed)
    state = out.with_name(f"{out.name}.training")
    with Progress() as progress:
        with progress.task(f"loading {candidate}"):
            model = load(
                candidate, device=device, trust_remote_code=trust_remote_code, say=progress.say
            )
        check(model, training)
        with progress.task(f"{method} on {on}") as tick:
            made = train(model, texts, training, state=state, progress=tick)
        with progress.task(f"saving to {out}"):
            save(made, out)
        shutil.rmtree(state, ignore_errors=True)
        losses = dict(made.achieved["recovered"]["losses"])
        progress.say(
            f"{made.label}: loss of texts held out {losses[0]:.3f} to {min(losses.values()):.3f} nat a token; "
            f"saved in {out}"
        )


@app.command(epilog=EPILOG)
def sweep(
    study: Annotated[
        Path,
        typer.Argument(help="TOML file: models, recipes as attn-drop@{1,3,5}, seeds, options."),
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            help="Folder for the results, or an fsspec URL; the same command resumes there.",
        ),
    ],
    workers: Annotated[int, typer.Option("--workers", help="Cells made at once.")] = 1,
    engine: Annotated[
        str, typer.Option("--engine", help="local: processes on this machine; ray: a cluster.")
    ] = "local",
    cpus: Annotated[float, typer.Option("--cpus", help="Cores of a worker on Ray.")] = 1,
    gpus: Annotated[float, typer.Option("--gpus", help="GPUs of a worker on Ray.")] = 0,
    data: DataOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells and what they may take; make none.")
    ] = False,
) -> None:
    """Make every cell of a STUDY: models x recipes x seeds, resumable, and report on them all."""
    from ..analysis.places import place
    from ..analysis.studies import finished
    from .engines import workers as started
    from .study_page import render_study
    from .studyfile import plans, read
    from .sweep import failures
    from .sweep import sweep as carry_out

    folder = place(out)
    what = plans(read(study, data=str(data) if data else None), folder)
    if dry_run:
        _dry_run(what)
        return
    with Progress() as progress:
        start = started(engine, workers, folder, progress, cpus=cpus, gpus=gpus)
        with _resumable(out, progress):
            carry_out(what, start, progress)
        with progress.task("report"):
            page = render_study(folder, folder / "report.html") if finished(folder) else None
    if page is not None:
        print(page)
    failed = failures(folder)
    for failure in failed:
        print(f"failed: {failure}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


@contextmanager
def _resumable(out: Path | str, progress: Progress) -> Generator[None]:
    """Says on an interrupt that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        progress.say(
            f"\ninterrupted; finished cells are kept in {out}, the same command goes on from there"
        )
        raise


def _dry_run(what: Any) -> None:
    """Every cell, whether it is there, and an estimate of time and memory."""
    from .estimate import estimate

    table = Table("model", "cell", "state", "minutes", "GB", box=None, pad_edge=False)
    rows = [row for name, one in what.items() for row in estimate(name, one)]
    for row in rows:
        table.add_row(
            row.model, row.cell, row.state, f"{row.seconds / 60:.1f}", f"{row.gigabytes:.1f}"
        )
    Console().print(table, markup=False)
    left = [r for r in rows if r.state != "done"]
    print(
        f"{len(rows)} cells, {len(left)} to be made: about {sum(r.seconds for r in left) / 60:.0f} minutes one after "
        f"the other, {max((r.gigabytes for r in left), default=0):.1f} GB at once for each worker "
        f"({rows[0].basis if rows else 'no cells'})"
    )


@app.command(epilog=EPILOG)
def forecast(
    candidate: Annotated[
        str, typer.Argument(help="A compressed model (folder, hub id, .gguf) or a recipe.")
    ],
    study: Annotated[str, typer.Option("--study", help="Folder that sweep or diagnose wrote.")],
    dense: Annotated[
        str, typer.Option("--dense", help="What it was made from (default: the study's model).")
    ] = "",
    device: DeviceOption = "cpu",
    trust_remote_code: TrustOption = False,
) -> None:
    """Foretell what CANDIDATE keeps, from one pass over a study's prompts, without scoring it."""
    from .foretell import foretell

    with Progress() as progress:
        told, covered = foretell(
            candidate, study, dense, progress, device=device, trust_remote_code=trust_remote_code
        )
    print(told)
    if not covered:
        raise typer.Exit(1)


@app.command(epilog=EPILOG)
def report(
    folder: Annotated[list[Path], typer.Argument(help="Folders that diagnose or compare wrote.")],
    out: Annotated[Path, typer.Option("--out", help="The HTML file to write.")],
) -> None:
    """Render the report again, from one run or several, or of a sweep."""
    from ..analysis.studies import finished
    from .render import render
    from .study import cells
    from .study_page import render_study

    if len(folder) == 1 and not (folder[0] / "study.json").exists() and finished(folder[0]):
        print(render_study(folder[0], out))  # of a sweep: all its cells together
        return
    found: dict[str, Any] = {}
    for place in folder:
        for name, cell in cells(place).items():
            found[name if name not in found else f"{name} ({place.name})"] = cell
    print(render(found, out))


@app.command("import-lm-eval", epilog=EPILOG)
def import_lm_eval(
    samples: Annotated[
        list[Path],
        typer.Argument(help="samples_*.jsonl of lm-evaluation-harness, a folder for each model."),
    ],
    dense: Annotated[Path, typer.Option("--dense", help="The folder of the dense model's files.")],
    out: OutOption,
) -> None:
    """Bring in scores that lm-evaluation-harness wrote for both models, and report on them."""
    from ..analysis import schema
    from .imported import read
    from .render import render
    from .request import check_empty

    check_empty(out)
    found = read(samples, dense)
    for name, cell in found.items():
        schema.write(cell, out / "cells" / f"{name}.nc")
    print(render(found, out / "report.html"))


@app.command("list", epilog=EPILOG)
def list_(
    what: Annotated[
        str, typer.Argument(help="recipes, tasks or metrics; all of them without.")
    ] = "",
) -> None:
    """List what there is, with one line each."""
    from ..probes.benchmarks import BENCHMARKS, MADE
    from ..probes.twins import TWINS

    tables = {
        "recipes": [(m.example, m.describe) for m in METHODS.values()],
        "tasks": [
            *((n, f"{t.describe}, asked as choice and as generation") for n, t in TWINS.items()),
            *((n, t.describe) for n, t in {**BENCHMARKS, **MADE}.items()),
        ],
        "metrics": [
            (n, f"{v.long_name} [{v.units or 'text'}]")
            for g in SCHEMA.values()
            for n, v in g.items()
        ],
    }
    if what and what not in tables:
        raise typer.BadParameter(f"{what!r} is not one of {', '.join(tables)}")
    for name, rows in tables.items():
        if what in ("", name):
            table = Table(name, "", box=None, pad_edge=False)
            for left, right in dict(rows).items():
                table.add_row(left, right)
            Console().print(table, markup=False)


@app.callback(invoke_without_command=True)
def main_options(
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Explains why a compressed language model fails: what broke, where, and how sure that is."""
    if show:
        print(version("prunescope"))
        raise typer.Exit


def _names(tasks: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in tasks.split(",") if name.strip())


def _study(options: dict[str, Any], out: Path) -> None:
    from .render import render
    from .request import Request, plan
    from .study import cells, run

    paths: dict[str, Any] = {
        name: str(value) if value is not None else None
        for name, value in options.items()
        if name in ("data", "prompts")
    }
    request = Request(**(options | paths))
    what = plan(request, out)  # everything that can be wrong is found before the first model loads
    with Progress() as progress:
        with _resumable(out, progress):
            run(what, progress)
        with progress.task("report"):
            file = render(cells(out), out / "report.html")
    print(file)


def _usage_errors() -> tuple[type[Exception], ...]:
    from ..analysis.forecast import ForecastError
    from ..analysis.places import PlaceError
    from ..probes.anatomy import AnatomyError
    from ..probes.backends import BackendError
    from ..probes.decode import DecodeError
    from ..probes.items import TaskError
    from ..probes.load import LoadError
    from ..probes.measure import MeasureError
    from ..probes.recover import RecoverError
    from ..probes.sandbox import SandboxError
    from ..probes.save import SaveError
    from ..probes.texts import TextError
    from .request import StudyError

    return (
        AnatomyError,
        BackendError,
        DecodeError,
        ForecastError,
        LoadError,
        MeasureError,
        PlaceError,
        RecipeError,
        RecoverError,
        SandboxError,
        SaveError,
        SchemaError,
        StudyError,
        TaskError,
        TextError,
    )


def main() -> None:
    """Entry point: usage errors end with status 2, failures with 1, an interrupt with 130."""
    hush()
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if isinstance(error, _usage_errors()):
            print(f"prunescope: {error}", file=sys.stderr)
            sys.exit(2)
        if os.environ.get("PRUNESCOPE_DEBUG"):
            raise
        print(
            f"prunescope: {type(error).__name__}: {error}\n(PRUNESCOPE_DEBUG=1 shows where)",
            file=sys.stderr,
        )
        sys.exit(1)
