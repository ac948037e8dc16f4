"""Recipes: what is done to a model, as a value that prints and parses back.

attn-drop@8                    the 8 least important attention sublayers
attn-drop@layers=3,7           these two
attn-drop@8-kl-iterative       ranked by the damage at the output, anew after each
block-drop@4-angular           a run of four layers, by the angle between its ends
magnitude@0.5                  the smaller half of each weight matrix
wanda@2:4                      two of every four weights, by |w| times the size of what it reads
rtn@int4-g64                   4-bit integers, one scale per 64 weights
bitsandbytes@nf4               packed by another library
rtn@int4-g64-keep=mlp.29       all but one sublayer
neurons-reverse@0.1,target=counting,control=capitals
                               the MLP neurons that one task excites most beside another, cut out
attn-drop@4+rtn@int8           one after the other
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, NamedTuple


class RecipeError(ValueError):
    """A recipe that cannot be read or carried out; the message says what is allowed."""


@dataclass(frozen=True)
class Count:
    """So many sublayers, the least important first, ranked at once or anew after each."""

    n: int
    by: str = "cosine"
    iterative: bool = False

    def __str__(self) -> str:
        ranking = f"-{self.by}" if self.by != "cosine" else ""
        return f"{self.n}{ranking}{'-iterative' if self.iterative else ''}"


@dataclass(frozen=True)
class Layers:
    """These layers, by number."""

    layers: tuple[int, ...]

    def __str__(self) -> str:
        return "layers=" + ",".join(map(str, self.layers))


@dataclass(frozen=True)
class Ratio:
    """This share of the weights, between 0 and 1; `seed` draws them where it is by lot."""

    share: float
    seed: int | None = None

    def __str__(self) -> str:
        return f"{self.share:g}{_seeded(self.seed)}"


@dataclass(frozen=True)
class Pattern:
    """At most `keep` weights in every `of` along the input; `seed` as in `Ratio`."""

    keep: int
    of: int
    seed: int | None = None

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}{_seeded(self.seed)}"


def _seeded(seed: int | None) -> str:
    return "" if seed is None else f",seed={seed}"


@dataclass(frozen=True)
class Integer:
    """Integers of so many bits, one scale per group of weights along the input (0: per row)."""

    bits: int
    group: int = 0

    def __str__(self) -> str:
        return f"int{self.bits}" + (f"-g{self.group}" if self.group else "")


@dataclass(frozen=True)
class Scheme:
    """A format that a library knows by name."""

    name: str

    def __str__(self) -> str:
        return self.name


SELECTIVITIES = ("normalised", "difference", "ratio", "standardised")
SCOPES = ("layer", "global")


@dataclass(frozen=True)
class Neurons:
    """This share of the MLP neurons, ranked by how much a target task excites them.

    `control` are the tasks that it is held against (none: the calibration texts), `scope` whether
    every layer loses the same share, `multiple` what divides the width that is kept, `seed` draws
    the items that rank and the order of `neurons-random` (none: the seed of the run).
    """

    share: float
    target: str = "addition"
    control: tuple[str, ...] = ()
    metric: str = "normalised"
    scope: str = "layer"
    multiple: int = 8
    seed: int | None = None

    def __str__(self) -> str:
        options: dict[str, object] = {
            "target": self.target, "control": "/".join(self.control), "metric": self.metric,
            "scope": self.scope, "multiple": self.multiple, "seed": self.seed,
        }  # fmt: skip
        usual = Neurons(self.share)
        told = [f",{k}={v}" for k, v in options.items() if getattr(self, k) != getattr(usual, k)]
        return f"{self.share:g}{''.join(told)}"


Amount = Count | Layers | Ratio | Pattern | Integer | Scheme | Neurons
RANKINGS = ("cosine", "kl", "var-r")


def _drop_amount(text: str) -> Amount:
    if match := re.fullmatch(r"layers=(\d+(?:,\d+)*)", text):
        layers = tuple(sorted({int(x) for x in match[1].split(",")}))
        return Layers(layers)
    return _count(text, RANKINGS)


def _count(text: str, rankings: tuple[str, ...]) -> Count:
    pattern = rf"([1-9]\d*)(?:-({'|'.join(rankings)}))?(-iterative)?"
    match = re.fullmatch(pattern, text)
    if match and not (match[2] == "angular" and match[3]):
        return Count(int(match[1]), match[2] or "cosine", bool(match[3]))
    raise RecipeError(
        f"a number of sublayers from 1, ranked by {', '.join(rankings)}, at once or iterative "
        "(8, 8-kl, 8-kl-iterative), or layers (layers=3,7)"
    )


def _joint_amount(text: str) -> Amount:
    return _count(text, RANKINGS)


def _block_amount(text: str) -> Amount:
    return (
        _drop_amount(text) if text.startswith("layers=") else _count(text, (*RANKINGS, "angular"))
    )


def _share_amount(text: str) -> Amount:
    if match := re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text):
        keep, of = int(match[1]), int(match[2])
        if keep < of:
            return Pattern(keep, of)
    share = _number(text)
    if 0 < share < 1:
        return Ratio(float(f"{share:g}"))
    raise RecipeError(
        "a share of the weights between 0 and 1, as 0.5, or a pattern, as 2:4 (2 of every 4 stay)"
    )


def _lot_amount(text: str) -> Amount:
    share, comma, seed = text.partition(",seed=")
    if not comma:
        return _share_amount(share)
    try:
        if re.fullmatch(r"\d+", seed):
            return replace(_share_amount(share), seed=int(seed))
    except RecipeError:
        pass
    raise RecipeError(
        "a share of the weights, as 0.5, or a pattern, as 2:4, with a seed if any, as random@0.5,seed=1"
    )


def _integer_amount(text: str) -> Amount:
    match = re.fullmatch(r"int(\d+)(?:-g(\d+))?", text)
    if match and 2 <= int(match[1]) <= 8 and (match[2] is None or int(match[2]) >= 8):
        return Integer(int(match[1]), int(match[2] or 0))
    raise RecipeError(
        "int2 to int8, with a group of at least 8 if any, as rtn@int8 or rtn@int4-g64"
    )


def _torchao_amount(text: str) -> Amount:
    match = re.fullmatch(r"int([48])(?:-g(\d+))?", text)
    if match and (match[2] is None or int(match[2]) >= 8):
        return Integer(int(match[1]), int(match[2] or 0))
    raise RecipeError("int8 or int4, with a group of at least 8 if any, as torchao@int4-g32")


def _bitsandbytes_amount(text: str) -> Amount:
    if text in ("nf4", "int8"):
        return Scheme(text)
    raise RecipeError("nf4 or int8")


_OPTIONS: dict[str, str] = {
    "target": r"[\w.:-]+", "control": r"[\w.:-]+(/[\w.:-]+)*", "metric": "|".join(SELECTIVITIES),
    "scope": "|".join(SCOPES), "multiple": r"[1-9]\d*", "seed": r"\d+",
}  # fmt: skip


def _neurons_amount(text: str) -> Amount:
    share, *options = text.split(",")
    pairs = [part.partition("=") for part in options]
    given = {name: value for name, _, value in pairs}
    ratio = _number(share)
    if (
        not 0 < ratio < 1
        or len(given) < len(options)
        or not all(re.fullmatch(_OPTIONS.get(n, "(?!)"), v) for n, v in given.items())
    ):
        raise RecipeError(
            "a share of the neurons between 0 and 1, with target=TASK, control=TASK/TASK, "
            f"metric={'|'.join(SELECTIVITIES)}, scope={'|'.join(SCOPES)}, multiple=N, seed=N if any, as "
            "neurons-reverse@0.1,target=counting,control=capitals"
        )
    values: dict[str, Any] = {**given}
    values |= {n: int(given[n]) for n in ("multiple", "seed") if n in given}
    if "control" in given:
        values["control"] = tuple(given["control"].split("/"))
    return Neurons(float(f"{ratio:g}"), **values)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return -1.0


class Method(NamedTuple):
    """A row of the table of recipes: how its amount is read, an example, one line of help."""

    amount: Callable[[str], Amount]
    example: str
    describe: str


METHODS: dict[str, Method] = {
    "attn-drop": Method(
        _drop_amount, "attn-drop@5", "remove attention sublayers, least important first"
    ),
    "mlp-drop": Method(_drop_amount, "mlp-drop@3", "remove MLP sublayers, least important first"),
    "block-drop": Method(
        _block_amount, "block-drop@3", "remove whole layers, least important first"
    ),
    "joint-drop": Method(
        _joint_amount, "joint-drop@6", "remove attention and MLP sublayers, ranked together"
    ),
    "magnitude": Method(_share_amount, "magnitude@0.5", "zero the smallest weights of each matrix"),
    "wanda": Method(
        _share_amount, "wanda@0.5", "zero weights by size times the size of what they read"
    ),
    "sparsegpt": Method(
        _share_amount, "sparsegpt@2:4", "zero weights and let the rest make up for them"
    ),
    "random": Method(_lot_amount, "random@0.5", "zero weights by lot, the control"),
    "neurons-selective": Method(
        _neurons_amount,
        "neurons-selective@0.15",
        "cut out the MLP neurons least specific to a task",
    ),
    "neurons-reverse": Method(
        _neurons_amount, "neurons-reverse@0.1", "cut out the MLP neurons most specific to a task"
    ),
    "neurons-random": Method(
        _neurons_amount, "neurons-random@0.15", "cut out as many by lot, the control"
    ),
    "neurons-salience": Method(
        _neurons_amount, "neurons-salience@0.15", "cut out those that do least on a task"
    ),
    "neurons-salience-reverse": Method(
        _neurons_amount, "neurons-salience-reverse@0.1", "cut out those that do most on a task"
    ),
    "rtn": Method(_integer_amount, "rtn@int4-g64", "round weights to integers, group by group"),
    "gptq": Method(
        _integer_amount, "gptq@int4-g64", "round and let the other weights make up for it"
    ),
    "awq": Method(
        _integer_amount, "awq@int4-g64", "round after scaling the channels that read much"
    ),
    "torchao": Method(
        _torchao_amount, "torchao@int8", "integers packed by torchao (an extra): int8, int4"
    ),
    "bitsandbytes": Method(
        _bitsandbytes_amount, "bitsandbytes@nf4", "packed by bitsandbytes (an extra): nf4, int8"
    ),
}
"""Every method by name. A new one is a row here and a function in `compress.APPLY`."""


Place = tuple[str, int]
"""A sublayer: `attn` or `mlp`, and its layer."""


@dataclass(frozen=True)
class Step:
    """One method with its amount, and the sublayers that it leaves alone: `method@amount-keep=…`."""

    method: str
    amount: Amount
    keep: tuple[Place, ...] = ()

    def __str__(self) -> str:
        kept = ",".join(f"{site}.{layer}" for site, layer in self.keep)
        return f"{self.method}@{self.amount}" + (f"-keep={kept}" if kept else "")


@dataclass(frozen=True)
class Recipe:
    """Steps carried out one after the other; `Recipe.parse(str(recipe)) == recipe`."""

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return "+".join(map(str, self.steps))

    def seeded(self, seed: int) -> Recipe:
        """The same with this seed wherever something is drawn and no seed is given.

        >>> str(Recipe.parse("random@0.5+rtn@int8").seeded(2))
        'random@0.5,seed=2+rtn@int8'
        """
        return Recipe(
            tuple(
                replace(step, amount=replace(step.amount, seed=seed))
                if _draws(step)
                and isinstance(step.amount, Ratio | Pattern | Neurons)
                and step.amount.seed is None
                else step
                for step in self.steps
            )
        )

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read a recipe.

        Raises:
            RecipeError: an unknown method (with the nearest), or an amount out of range.

        >>> str(Recipe.parse("attn-drop@layers=7,3 + rtn@int4-g64"))
        'attn-drop@layers=3,7+rtn@int4-g64'
        """
        return cls(tuple(_step(part.strip(), text) for part in text.split("+")))


def _draws(step: Step) -> bool:
    """Whether chance plays: weights by lot, or items drawn to rank neurons."""
    return step.method == "random" or isinstance(step.amount, Neurons)


def _step(part: str, text: str) -> Step:
    method, at, amount = part.partition("@")
    if method not in METHODS:
        near = get_close_matches(method, METHODS, n=1, cutoff=0.4)
        raise RecipeError(
            f"recipe {text!r}: unknown method {method!r}"
            + (f"; did you mean {METHODS[near[0]].example!r}?" if near else "")
            + f" Allowed: {', '.join(METHODS)} (see `prunescope list recipes`)"
        )
    if not at:
        raise RecipeError(
            f"recipe {text!r}: {method} needs an amount, as {METHODS[method].example!r}"
        )
    amount, _, kept = amount.partition("-keep=")
    try:
        return Step(method, METHODS[method].amount(amount), _kept(method, kept))
    except RecipeError as error:
        raise RecipeError(f"recipe {text!r}: amount {amount!r} is not {error}") from None


def _kept(method: str, text: str) -> tuple[Place, ...]:
    if not text:
        return ()
    matches = [re.fullmatch(r"(attn|mlp)\.(\d+)", part) for part in text.split(",")]
    if method.endswith("-drop") or not all(matches):
        raise RecipeError(
            "one with sublayers to keep as they are, as -keep=attn.3,mlp.29 (for drops, name the "
            "layers instead: layers=3,7)"
        )
    return tuple(sorted({(m[1], int(m[2])) for m in matches if m}))
