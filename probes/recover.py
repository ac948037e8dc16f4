"""Recovery: train a candidate on texts, without giving back what compression took.

`lora` learns a low-rank change of every weight matrix in the layers, `full` every weight; `scale`
only one factor for each sublayer and `temperature` only one for the logits: do these bring back
what was lost, then calibration broke, and not knowledge. Zeros stay zeros, and rounded weights stay
on their grid (straight-through gradients): a change that is merged never fills a mask.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..analysis.places import beside
from . import backends, prune
from .anatomy import dropped, linears
from .items import SEED, without_examples
from .model import Model, pad
from .neurons import marks
from .recipe import Integer

METHODS = ("lora", "full", "scale", "temperature")
RATES = {"lora": 1e-3, "full": 5e-5, "scale": 1e-2, "temperature": 2e-2}
RANK, ALPHA = 16, 32
ROWS, TOKENS = 8, 128  # of a step
HELD_OUT = 0.15  # of the texts, for the validation loss
EVERY = 20  # steps between validations, each a checkpoint
PATIENCE = 5  # validations without a better loss
REFIT = 64  # texts that `scale` and `temperature` are fitted on
ON_A_GRID = ("rtn", "gptq")
OFF_GRID = ("awq", "torchao", "bitsandbytes")


class RecoverError(ValueError):
    """A recovery that cannot start as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Training:
    """How a candidate is trained; equal trainings of equal candidates give the same weights."""

    method: str = "lora"
    steps: int = 100
    seed: int = SEED
    rate: float | None = None

    @property
    def learning_rate(self) -> float:
        """As asked, else the method's."""
        return RATES[self.method] if self.rate is None else self.rate


def check(candidate: Model, training: Training) -> None:
    """Whether a candidate can be trained so, before any work.

    Raises:
        RecoverError: an unknown method, numbers out of range, packed or rescaled weights.
    """
    if training.method not in METHODS:
        raise RecoverError(f"--method {training.method!r} is not one of {', '.join(METHODS)}")
    if training.steps < 1 or training.learning_rate <= 0:
        raise RecoverError(
            f"--steps is {training.steps} and the rate {training.learning_rate}; both must be above 0"
        )
    used = [s.method for s in (candidate.recipe.steps if candidate.recipe else ())]
    bad = [m for m in used if m in OFF_GRID]
    packed = any(backends.packed(m) for m in linears(candidate.anatomy, candidate.module).values())
    if packed and training.method != "temperature":
        raise RecoverError(
            f"the weights of {candidate.label} are packed by a library and cannot be trained: recover before that "
            "step, or use --method temperature"
        )
    if training.method in ("lora", "full") and bad:
        raise RecoverError(
            f"the weights of {candidate.label} are rounded by {bad[0]}, and training would take them off their "
            "grid: recover before that step, or use --method scale"
        )


# --- what is trained -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """Numbers to learn, and the weights that they make of the candidate's."""

    learned: dict[str, Tensor]
    weights: Callable[[], dict[str, Tensor]]


def change(candidate: Model, training: Training) -> Change:
    """The change that a method learns; none at first."""
    torch.manual_seed(training.seed)
    make = {"lora": _lora, "full": _full, "scale": _scale, "temperature": _temperature}
    return make[training.method](candidate)


def _matrices(candidate: Model) -> dict[str, Tensor]:
    return {
        f"{name}.weight": module.get_parameter("weight").detach()
        for name, module in linears(candidate.anatomy, candidate.module).items()
    }


def _held(candidate: Model) -> Callable[[str, Tensor], Tensor]:
    """What keeps a changed weight compressed: its zeros, and its grid."""
    matrices, integer = _matrices(candidate), _integer(candidate)
    masks = {n: w != 0 for n, w in matrices.items() if bool((w == 0).any())}
    flipped = {
        f"{n}.weight"
        for n, m in linears(candidate.anatomy, candidate.module).items()
        if not isinstance(m, nn.Linear)
    }

    def hold(name: str, weight: Tensor) -> Tensor:
        if integer is not None and name in matrices:
            plain = weight.detach().T if name in flipped else weight.detach()
            on = prune.round_to_nearest(plain, integer.bits, integer.group)
            weight = weight + ((on.T if name in flipped else on) - weight).detach()
        return weight * masks[name] if name in masks else weight

    return hold


def _integer(candidate: Model) -> Integer | None:
    steps = candidate.recipe.steps if candidate.recipe else ()
    amounts = [s.amount for s in steps if s.method in ON_A_GRID]
    return amounts[-1] if amounts and isinstance(amounts[-1], Integer) else None


def _lora(candidate: Model) -> Change:
    matrices, hold = _matrices(candidate), _held(candidate)
    learned: dict[str, Tensor] = {}
    for name, w in matrices.items():
        down = torch.randn(RANK, w.shape[1], device=w.device) / w.shape[1] ** 0.5
        learned[f"{name}.a"] = down.requires_grad_()
        learned[f"{name}.b"] = torch.zeros(w.shape[0], RANK, device=w.device).requires_grad_()

    def weights() -> dict[str, Tensor]:
        made = {
            n: w.float() + (learned[f"{n}.b"] @ learned[f"{n}.a"]) * (ALPHA / RANK)
            for n, w in matrices.items()
        }
        return {n: hold(n, w).to(matrices[n].dtype) for n, w in made.items()}

    return Change(learned, weights)


def _full(candidate: Model) -> Change:
    hold = _held(candidate)
    there = dict(candidate.module.named_parameters())
    learned = {n: p.detach().float().clone().requires_grad_() for n, p in there.items()}

    def weights() -> dict[str, Tensor]:
        return {n: hold(n, w).to(there[n].dtype) for n, w in learned.items()}

    return Change(learned, weights)


def _scale(candidate: Model) -> Change:
    """One factor on what each sublayer adds: its last matrix and bias."""
    anatomy, there = candidate.anatomy, dict(candidate.module.named_parameters())
    sites: dict[str, list[str]] = {}
    for layer, block in enumerate(anatomy.blocks(candidate.module)):
        for site, path in (("attn", anatomy.attn_out), ("mlp", anatomy.neurons.out)):
            if not dropped(anatomy, block, "attn" if site == "attn" else "mlp"):
                whole = f"{anatomy.layers}.{layer}.{path}"
                sites[f"{site}.{layer}"] = [
                    n for n in (f"{whole}.weight", f"{whole}.bias") if n in there
                ]
    learned = {n: torch.ones((), device=candidate.device).requires_grad_() for n in sites}

    def weights() -> dict[str, Tensor]:
        return {
            n: (there[n].detach() * learned[site]).to(there[n].dtype)
            for site, names in sites.items()
            for n in names
        }

    return Change(learned, weights)


def _temperature(candidate: Model) -> Change:
    """One factor on the logits, as part of the final norm."""
    norm, there = candidate.anatomy.final_norm, dict(candidate.module.named_parameters())
    names = [n for n in (f"{norm}.weight", f"{norm}.bias") if n in there]
    learned = {"inverse": torch.ones((), device=candidate.device).requires_grad_()}
    shift = candidate.anatomy.norm_adds

    def weights() -> dict[str, Tensor]:
        return {
            n: ((there[n].detach() + shift) * learned["inverse"] - shift).to(there[n].dtype)
            for n in names
        }

    return Change(learned, weights)


# --- training ------------------------------------------------------------------------------------


def recover(
    candidate: Model,
    texts: Sequence[str],
    training: Training = Training(),
    *,
    state: Path | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> Model:
    """Train a candidate on texts; the candidate itself stays as it is.

    Args:
        candidate: any model, a dense one too (the control).
        texts: to train on; some are held out for the validation loss, which ends the training early.
        training: method, steps, seed, rate.
        state: a folder for checkpoints; training goes on from the one that is there.
        progress: called with the share of the steps that are done.

    Returns:
        The candidate with the weights of the best validation; `achieved["recovered"]` tells of it.

    Raises:
        RecoverError: see `check`; too few texts; a checkpoint of another training.
    """
    check(candidate, training)
    train, held = _split(candidate, texts, training)
    made = change(candidate, training)
    key = hashlib.sha256(
        json.dumps(
            [candidate.weights, str(candidate.recipe), asdict(training), list(texts)]
        ).encode()
    ).hexdigest()
    run = _Run(candidate, made, training, train, held)
    if state is None or not run.resume(state, key):
        run.validate()
    while run.step < training.steps and run.stale < PATIENCE:
        run.advance()
        if run.step % EVERY == 0 or run.step == training.steps:
            run.validate()
            if state is not None:
                run.checkpoint(state, key)
        progress(run.step / training.steps)
    return run.result(texts)


def _split(
    candidate: Model, texts: Sequence[str], training: Training
) -> tuple[list[list[int]], list[list[int]]]:
    chosen = without_examples(texts)
    order = random.Random(training.seed)
    order.shuffle(chosen)
    if training.method in ("scale", "temperature"):
        chosen = chosen[:REFIT]
    rows = [candidate.tokenizer(t)["input_ids"][:TOKENS] for t in chosen]
    rows = [r for r in rows if len(r) > 1]
    held = max(1, round(HELD_OUT * len(rows)))
    if len(rows) - held < ROWS:
        raise RecoverError(
            f"{len(rows)} texts of at least two tokens to train on; {ROWS + 2} are needed at least"
        )
    return rows[held:], rows[:held]


class _Run:
    """A training that can stop after any step and go on."""

    def __init__(
        self, candidate: Model, made: Change, training: Training,
        train: list[list[int]], held: list[list[int]],
    ) -> None:  # fmt: skip
        self.candidate, self.made, self.training = candidate, made, training
        self.train, self.held = train, held
        self.optimizer = torch.optim.AdamW(
            made.learned.values(), lr=training.learning_rate, weight_decay=0.0
        )
        self.step = self.stale = 0
        self.losses: list[tuple[int, float]] = []

    def advance(self) -> None:
        """One step on the batch that is its turn."""
        rate = self.training.learning_rate * min(1.0, (self.step + 1) / 10)
        rate *= 1 - self.step / self.training.steps
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        self._loss(self._batch()).backward()
        torch.nn.utils.clip_grad_norm_(list(self.made.learned.values()), 1.0)
        self.optimizer.step()
        self.step += 1

    def _batch(self) -> list[list[int]]:
        """Rows of this step: the texts in a new order each time they have all been read."""
        per_epoch = max(1, len(self.train) // ROWS)
        epoch, place = divmod(self.step, per_epoch)
        order = random.Random(f"{self.training.seed}-{epoch}").sample(self.train, len(self.train))
        return order[place * ROWS : (place + 1) * ROWS]

    def _loss(self, rows: list[list[int]]) -> Tensor:
        batch = pad(self.candidate, rows)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        found: Any = torch.func.functional_call(
            self.candidate.module, self.made.weights(), (),
            {**batch, "labels": labels, "use_cache": False},
        )  # fmt: skip
        return found.loss.float()

    @torch.no_grad()
    def validate(self) -> None:
        """Mean loss per token of the texts held out; the best so far is kept."""
        total = tokens = 0.0
        for start in range(0, len(self.held), ROWS):
            rows = self.held[start : start + ROWS]
            count = sum(len(r) - 1 for r in rows)
            total += float(self._loss(rows)) * count
            tokens += count
        loss = total / tokens
        better = not self.losses or loss < min(v for _, v in self.losses)
        self.stale = 0 if better else self.stale + 1
        self.losses.append((self.step, loss))
        if better:
            self.best = {n: t.detach().clone() for n, t in self.made.learned.items()}

    def checkpoint(self, folder: Path, key: str) -> None:
        """Everything that the rest of the training depends on, complete or absent."""
        tensors = {f"now.{n}": t.detach() for n, t in self.made.learned.items()}
        tensors |= {f"best.{n}": t for n, t in self.best.items()}
        for n, t in self.made.learned.items():
            moments = self.optimizer.state.get(t, {})
            tensors |= {f"{k}.{n}": v.float() for k, v in moments.items()}
        told = {"key": key, "step": self.step, "stale": self.stale, "losses": self.losses}
        whole = {n: t.contiguous().clone() for n, t in tensors.items()}
        with beside(folder / "training.safetensors") as scratch:
            save_file(whole, scratch, {"training": json.dumps(told)})

    def resume(self, folder: Path, key: str) -> bool:
        """Go on from a checkpoint; whether there is one."""
        file = folder / "training.safetensors"
        if not file.is_file():
            return False
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:  # type: ignore[no-untyped-call]
            told = json.loads(opened.metadata()["training"])
        if told["key"] != key:
            raise RecoverError(
                f"{folder} holds the checkpoint of another training; remove it, or ask for the same"
            )
        tensors = load_file(file, device=str(self.candidate.device))
        self.step, self.stale = told["step"], told["stale"]
        self.losses = [(int(s), float(v)) for s, v in told["losses"]]
        self.best = {n: tensors[f"best.{n}"] for n in self.made.learned}
        with torch.no_grad():
            for n, t in self.made.learned.items():
                t.copy_(tensors[f"now.{n}"])
                self.optimizer.state[t] = {
                    k: tensors[f"{k}.{n}"] if k != "step" else tensors[f"{k}.{n}"].cpu()
                    for k in ("step", "exp_avg", "exp_avg_sq")
                }
        return True

    @torch.no_grad()
    def result(self, texts: Sequence[str]) -> Model:
        """The candidate with its best weights."""
        for n, t in self.made.learned.items():
            t.copy_(self.best[n])
        achieved = json.loads(json.dumps(self.candidate.achieved))
        achieved["recovered"] = {
            **asdict(self.training), "rate": self.training.learning_rate, "trained": self.step,
            "learned": sum(t.numel() for t in self.made.learned.values()),
            "losses": self.losses, "from": self.candidate.weights, "texts": marks(texts),
        }  # fmt: skip
        made = self.candidate.clone(achieved=achieved)
        for name, weight in self.made.weights().items():
            path, _, kind = name.rpartition(".")
            new = nn.Parameter(weight.detach().clone(), requires_grad=False)
            made.module.get_submodule(path).register_parameter(kind, new)
        if made.module.config.tie_word_embeddings:
            made.module.tie_weights()
        return made
