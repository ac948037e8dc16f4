"""What the four histories of decoding say: compounding, divergence, which tokens, degeneration.

Everything reads the group `/steps` (see `schema`); the independent unit of every interval is the
prompt.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xarray as xr
from scipy import optimize, stats

from .schema import HISTORIES
from .statistics import SEED, Interval, interval, resamples

FACTORS = {
    "compounding": ("free", "step"),
    "cache": ("forced", "step"),
    "tokens": ("free", "forced"),
}
"""Ratios of KL between histories; the middle one times the last is the first."""

NGRAM = 4
LOOP_PERIOD = 16  # longest loop that is looked for, in tokens
LOOP_TURNS = 3  # a text that ends with so many turns of a loop is in a loop
COLLAPSED_ENTROPY = 0.1  # nat; certain of nearly every next token
COLLAPSED_STEPS = 8  # for so many steps on end
BINS = 5
FOLDS = 5


# --- means over prompts --------------------------------------------------------------------------


def _picked(values: np.ndarray, seed: int = SEED) -> np.ndarray:
    """Means over prompts of `(prompt, …)` for every resample, NaN left out: `(draw, …)`."""
    there = np.isfinite(values)
    picks = resamples(np.zeros(len(values), np.int64), seed=seed)
    weights = np.zeros((len(picks), len(values)))
    np.add.at(weights, (np.arange(len(picks))[:, None], picks), 1.0)
    total = np.tensordot(weights, np.where(there, values, 0.0), axes=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return total / np.tensordot(weights, there.astype(float), axes=1)


def _mean(values: np.ndarray) -> np.ndarray:
    there = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(there, values, 0.0).sum(0) / there.sum(0)


def _banded(value: np.ndarray, draws: np.ndarray, dims: tuple[str, ...]) -> dict[str, xr.DataArray]:
    with np.errstate(all="ignore"):
        known = np.isfinite(draws).any(0)
        low, high = np.nanquantile(np.where(known, draws, 0.0), [0.025, 0.975], axis=0)
    band = {
        "value": value,
        "low": np.where(known, low, np.nan),
        "high": np.where(known, high, np.nan),
    }
    return {name: xr.DataArray(array, dims=dims) for name, array in band.items()}


def curves(steps: xr.Dataset, figure: str = "kl") -> xr.Dataset:
    """Mean of a figure over the prompts still being written, `(step, history)`.

    `value` with the ends `low`, `high` of its 95 % bootstrap interval, and the number of prompts `n`.
    """
    values = steps[figure].transpose("prompt", "step", "history").values.astype(float)
    data = _banded(_mean(values), _picked(values), ("step", "history"))
    data["n"] = xr.DataArray(np.isfinite(values).sum(0), dims=("step", "history"))
    return xr.Dataset(data, coords={"step": steps.step.values, "history": steps.history.values})


def sequence_kl(steps: xr.Dataset) -> xr.Dataset:
    """KL of whole continuations up to each step, nat: the running sum of `forced` (chain rule).

    A text that has ended adds nothing. Under greedy decoding the sum is along the dense model's
    most likely text; where the texts were drawn it estimates KL(P(y) || P'(y)).
    """
    forced = _forced(steps, "kl")
    total = np.cumsum(np.nan_to_num(forced), axis=1)
    return xr.Dataset(
        _banded(_mean(total), _picked(total), ("step",)), coords={"step": steps.step.values}
    )


def _forced(steps: xr.Dataset, figure: str, history: str = "forced") -> np.ndarray:
    return steps[figure].sel(history=history).transpose("prompt", "step").values.astype(float)


def factors(steps: xr.Dataset) -> dict[str, Interval]:
    """How much KL the cache and the text add, over all steps that both texts have."""
    kl = steps.kl.transpose("prompt", "step", "history").values.astype(float)
    shared = np.isfinite(kl[..., HISTORIES.index("free")])[..., None]
    sums = np.where(shared, np.nan_to_num(kl), 0.0).sum(1)
    if not np.isfinite(kl[..., 0]).any():
        sums[:, 0] = np.nan
    picks = resamples(np.zeros(len(sums), np.int64))
    drawn, whole = sums[picks].sum(1), sums.sum(0)
    return {
        name: interval(float(_ratio(whole, *pair)), _ratio(drawn, *pair))
        for name, pair in FACTORS.items()
    }


def factors_by_step(steps: xr.Dataset) -> xr.Dataset:
    """The same at each step, `(step, factor)` with `value`, `low`, `high`."""
    kl = steps.kl.transpose("prompt", "step", "history").values.astype(float)
    shared = np.isfinite(kl[..., HISTORIES.index("free")])[..., None]
    kl = np.where(shared, kl, np.nan)
    mean, draws = _mean(kl), _picked(kl)
    value = np.stack([_ratio(mean, *pair) for pair in FACTORS.values()], -1)
    drawn = np.stack([_ratio(draws, *pair) for pair in FACTORS.values()], -1)
    data = _banded(value, drawn, ("step", "factor"))
    return xr.Dataset(data, coords={"step": steps.step.values, "factor": list(FACTORS)})


def _ratio(kl: np.ndarray, over: str, under: str) -> np.ndarray:
    above, below = (kl[..., HISTORIES.index(name)] for name in (over, under))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / below, np.nan)


# --- the law of growth ---------------------------------------------------------------------------

Law = Callable[..., np.ndarray]
LAWS: dict[str, tuple[Law, int]] = {
    "constant": (lambda t, a: a + 0 * t, 1),
    "linear": (lambda t, a, b: a + b * t, 2),
    "geometric": (lambda t, a, g: a * np.exp(np.clip(g * t, -50, 50)), 2),
    "saturating": (lambda t, a, c, r: c + (a - c) * np.exp(-np.clip(r * t, -50, 50)), 3),
}
"""Law -> (KL at step t from its parameters, how many)."""


@dataclass(frozen=True)
class Growth:
    """How the KL of a history grows with the step.

    `errors` are mean squared errors on prompts that the fit has not seen, in units of the
    constant's; `gain` is how much smaller the best law's error is than the constant's, paired over
    prompts; `parameters` are of the best law on all prompts.
    """

    history: str
    best: str
    errors: dict[str, float]
    gain: Interval
    parameters: tuple[float, ...]
    prompts: int


def growth(steps: xr.Dataset, history: str) -> Growth | None:
    """Fit every law of `LAWS` to the mean curve and compare them by held-out prompts.

    None where there are fewer than two prompts for each fold or nothing to fit.
    """
    values = _forced(steps, "kl", history)
    values = values[np.isfinite(values).any(1)]
    if len(values) < 2 * FOLDS or np.nanmax(values, initial=0.0) <= 0:
        return None
    fold = np.random.default_rng(SEED).permutation(len(values)) % FOLDS
    errors = {name: _held_out(values, fold, name) for name in LAWS}
    mean = {name: float(e.mean()) for name, e in errors.items()}
    best = min(mean, key=mean.__getitem__)
    base = errors["constant"]
    picks = resamples(np.zeros(len(values), np.int64))
    gains = 1 - errors[best][picks].mean(-1) / base[picks].mean(-1)
    gain = interval(1 - mean[best] / mean["constant"], gains)
    relative = {name: e / mean["constant"] for name, e in mean.items()}
    parameters = tuple(float(x) for x in _fit(_mean(values), best))
    return Growth(history, best, relative, gain, parameters, len(values))


def _held_out(values: np.ndarray, fold: np.ndarray, law: str) -> np.ndarray:
    """Mean squared error of each prompt under a fit to the other folds' mean, `(prompt,)`."""
    error = np.zeros(len(values))
    t = np.arange(values.shape[1], dtype=float)
    for k in range(FOLDS):
        expected = LAWS[law][0](t, *_fit(_mean(values[fold != k]), law))
        error[fold == k] = np.nanmean((values[fold == k] - expected) ** 2, axis=1)
    return error


def _fit(mean: np.ndarray, law: str) -> np.ndarray:
    """Least squares from several starts; the best of them."""
    there = np.isfinite(mean)
    t, y = np.flatnonzero(there).astype(float), mean[there]
    shape, count = LAWS[law]
    scale, length = float(np.abs(y).mean()) + 1e-12, max(1.0, float(t[-1]))
    starts = {1: [(1.0,)], 2: [(1.0, 0.0), (0.5, 1 / length)], 3: [(0.5, 1.0, 3 / length), (1.0, 2.0, 10 / length), (1.0, 0.5, 3 / length)]}  # fmt: skip
    fits = [
        optimize.least_squares(
            lambda x: shape(t, *x) - y / scale, start, method="trf", max_nfev=500
        )
        for start in starts[count]
    ]
    best = np.array(min(fits, key=lambda f: f.cost).x)
    free = {"constant": [0], "linear": [0, 1], "geometric": [0], "saturating": [0, 1]}[law]
    best[free] *= scale
    return best


# --- first divergence and survival ---------------------------------------------------------------


def divergence(steps: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Steps that the two texts have in common, and whether they then part, `(prompt,)` each.

    Texts that end together, or reach the limit of steps together, are censored there.
    """
    token = steps.token.transpose("prompt", "step", "model").values
    differ = token[..., 0] != token[..., 1]
    parts = differ.any(1)
    length = (token >= 0).all(-1).sum(1)
    return np.where(parts, differ.argmax(1), length), parts


@dataclass(frozen=True)
class Survival:
    """How long the two texts stay the same.

    `observed` is the Kaplan-Meier curve `(step,)` of "still the same after this many tokens" with
    its interval; `lower` and `upper` the band predicted from the forced pass alone for draws with
    common random numbers; `half_life` the first step at which `upper` falls under one half (inf:
    never within the steps), by bootstrap over prompts; `median` the observed median, in tokens;
    `agreement` the share of prompts whose first forced flip is the first divergence (an identity
    under greedy decoding).
    """

    step: np.ndarray
    observed: np.ndarray
    low: np.ndarray
    high: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    half_life: Interval
    median: float
    agreement: float
    parted: int
    prompts: int


def survival(steps: xr.Dataset) -> Survival:
    """Observed and predicted survival of the dense text in the candidate."""
    time, parts = divergence(steps)
    count = steps.sizes["step"]
    at = np.arange(count + 1)
    data = stats.CensoredData.right_censored(time + 1, ~parts)  # parting at step 0 is an event at 1
    curve = stats.ecdf(data).sf
    observed = curve.evaluate(at)
    with warnings.catch_warnings():  # undefined where nothing or everything has parted: NaN
        warnings.simplefilter("ignore", RuntimeWarning)
        span = curve.confidence_interval(method="log-log")
    low, high = (np.asarray(end.evaluate(at), float) for end in (span.low, span.high))
    lower, upper = _band(steps)
    picks = resamples(np.zeros(len(upper), np.int64))
    halves = _half(upper[picks].mean(1))
    half = float(_half(upper.mean(0)[None])[0])
    below = np.flatnonzero(observed < 0.5)
    return Survival(
        at, observed, low, high, lower.mean(0), upper.mean(0),
        Interval(half, *(float(x) for x in np.quantile(halves, [0.025, 0.975], method="nearest"))),
        float(below[0]) if len(below) else float("inf"), _agreement(steps), int(parts.sum()), len(time),
    )  # fmt: skip


def _band(steps: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Π (1-TV)/(1+TV) and Π (1-TV) of each prompt after 0, 1, … steps, `(prompt, step + 1)`."""
    tv = np.nan_to_num(_forced(steps, "tv"))
    start = np.ones((len(tv), 1))
    factors_ = ((1 - tv) / (1 + tv), 1 - tv)
    lower, upper = (np.concatenate([start, np.cumprod(f, axis=1)], axis=1) for f in factors_)
    return lower, upper


def _half(curve: np.ndarray) -> np.ndarray:
    """First place where each row is under one half; infinity where it never is."""
    under = curve < 0.5
    return np.where(under.any(-1), under.argmax(-1).astype(float), np.inf)


def _agreement(steps: xr.Dataset) -> float:
    time, parts = divergence(steps)
    flip = _forced(steps, "flip") == 1
    first = np.where(flip.any(1), flip.argmax(1), -1)
    return float((first == np.where(parts, time, -1)).mean())


class Bin(NamedTuple):
    """Steps of similar predicted chance to stay together: its band, and what was seen."""

    lower: float
    upper: float
    observed: Interval
    n: int


def calibration(steps: xr.Dataset, bins: int = BINS) -> list[Bin]:
    """Chance to write the same token next, predicted against observed, while the texts agree.

    The band [(1-TV)/(1+TV), 1-TV] is of draws with common random numbers; bins hold equally many
    steps.
    """
    time, parts = divergence(steps)
    tv = _forced(steps, "tv")
    step = np.arange(tv.shape[1])[None]
    at_risk = np.isfinite(tv) & (step <= np.where(parts, time, time - 1)[:, None])
    stays = (step != np.where(parts, time, -1)[:, None]).astype(float)
    chance = np.where(at_risk, 1 - tv, np.nan)
    order = np.argsort(chance, axis=None, kind="stable")[: int(at_risk.sum())]
    return [_bin(chance, stays, group) for group in np.array_split(order, bins) if len(group)]


def _bin(chance: np.ndarray, stays: np.ndarray, places: np.ndarray) -> Bin:
    inside = np.zeros(chance.size, bool)
    inside[places] = True
    some = chance.ravel()[places]
    observed = _rate(stays, inside.reshape(chance.shape), "", "")[0].rate
    return Bin(float((some / (2 - some)).mean()), float(some.mean()), observed, len(places))


class Jump(NamedTuple):
    """Mean KL of `free` and `forced` before the texts part and from the step after on, nat."""

    free_before: Interval
    free_after: Interval
    forced_before: Interval
    forced_after: Interval
    swapped_after: Interval
    prompts: int


def jump(steps: xr.Dataset) -> Jump | None:
    """What parting does to `free` and not to `forced`; None where too few prompts part to tell."""
    time, parts = divergence(steps)
    step = np.arange(steps.sizes["step"])[None]
    before, after = step <= time[:, None], (step > time[:, None]) & parts[:, None]
    kl = {h: _forced(steps, "kl", h) for h in HISTORIES}
    usable = (np.isfinite(kl["free"]) & after).any(1) & parts
    if usable.sum() < 3:
        return None

    def mean(history: str, where: np.ndarray) -> Interval:
        values = np.where(where & np.isfinite(kl["free"]), kl[history], np.nan)[usable]
        per_prompt = np.nanmean(values, axis=1)
        picks = resamples(np.zeros(len(per_prompt), np.int64))
        return interval(float(per_prompt.mean()), per_prompt[picks].mean(-1))

    return Jump(
        mean("free", before), mean("free", after), mean("forced", before), mean("forced", after),
        mean("swapped", after), int(usable.sum()),
    )  # fmt: skip


# --- which tokens --------------------------------------------------------------------------------

_FUNCTION_WORDS = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "been",
        "but",
        "by",
        "can",
        "could",
        "did",
        "do",
        "does",
        "for",
        "from",
        "had",
        "has",
        "have",
        "he",
        "her",
        "his",
        "i",
        "if",
        "in",
        "into",
        "is",
        "it",
        "its",
        "me",
        "my",
        "no",
        "nor",
        "not",
        "of",
        "on",
        "or",
        "our",
        "she",
        "should",
        "so",
        "than",
        "that",
        "the",
        "their",
        "them",
        "then",
        "there",
        "they",
        "this",
        "to",
        "us",
        "was",
        "we",
        "were",
        "what",
        "when",
        "where",
        "which",
        "who",
        "will",
        "with",
        "would",
        "you",
        "your",
    ]
)


def token_class(text: str) -> str:
    """What kind of token a text is: digits, punctuation, function word, word start, inside a word."""
    word = text.strip()
    if not word:
        return "white space"
    if any(c.isdigit() for c in word):
        return "digits"
    if not any(c.isalnum() for c in word):
        return "punctuation"
    if word.lower() in _FUNCTION_WORDS and text[:1].isspace():
        return "function word"
    return "first token of a word" if text[:1].isspace() or text[:1].isupper() else "inside a word"


class Flips(NamedTuple):
    """How often the candidate's most likely token differs, in one group of forced steps."""

    by: str
    group: str
    rate: Interval
    n: int


def flips(steps: xr.Dataset) -> list[Flips]:
    """Flip rates of `forced` by dense margin, dense entropy and kind of dense token.

    Margin and entropy are cut into quarters of equally many steps.
    """
    flip = _forced(steps, "flip")
    there = np.isfinite(flip)
    found: list[Flips] = []
    for by in ("margin", "entropy"):
        values = steps[by].transpose("prompt", "step").values.astype(float)
        edges = np.quantile(values[there], [0, 0.25, 0.5, 0.75, 1])
        for i in range(4):
            inside = there & (values >= edges[i]) & ((values < edges[i + 1]) | (i == 3))
            found += _rate(flip, inside, by, f"{edges[i]:.2g} to {edges[i + 1]:.2g} nat")
    texts = steps.token_text.sel(model="dense").transpose("prompt", "step").values
    kinds = np.vectorize(lambda t: token_class(str(t)), otypes=[object])(texts)
    for kind in sorted(set(kinds[there])):
        found += _rate(flip, there & (kinds == kind), "token", str(kind))
    return found


def _rate(flip: np.ndarray, inside: np.ndarray, by: str, group: str) -> list[Flips]:
    if not inside.any():
        return []
    hits, counts = np.where(inside, flip, 0.0).sum(1), inside.sum(1)
    picks = resamples(np.zeros(len(flip), np.int64))
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = hits[picks].sum(-1) / counts[picks].sum(-1)
    return [Flips(by, group, interval(float(hits.sum() / counts.sum()), drawn), int(counts.sum()))]


class Explained(NamedTuple):
    """Share of flips, and of the other steps, whose margin lies under the step's logit shift."""

    flips: Interval
    others: Interval
    n: int


def explained(steps: xr.Dataset) -> Explained | None:
    """How many flips a small margin explains.

    The logit shift of a step is √(2 Var_p[dz]): the typical change of the difference between two
    tokens drawn from p. None without flips.
    """
    flip = _forced(steps, "flip")
    shift = np.sqrt(2 * _forced(steps, "var_p"))
    margin = steps.margin.transpose("prompt", "step").values.astype(float)
    under = margin < shift
    yes, no = flip == 1, flip == 0
    if not yes.any() or not no.any():
        return None
    inside, outside = (_rate(under.astype(float), which, "", "")[0].rate for which in (yes, no))
    return Explained(inside, outside, int(yes.sum()))


# --- degeneration --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Degeneration:
    """What becomes of one model's texts, `(prompt,)` arrays; NaN where it does not happen.

    `repetition` is the share of repeated 4-grams, `loop` the period of the loop that the text ends
    in, in tokens, `onset` the step where it begins, `collapse` the first of eight steps of almost no
    entropy, `no_stop` 1 where the limit ended the text.
    """

    repetition: np.ndarray
    loop: np.ndarray
    onset: np.ndarray
    collapse: np.ndarray
    no_stop: np.ndarray


def degeneration(steps: xr.Dataset, model: str) -> Degeneration:
    """Repetition, loops, missing stops and collapsed entropy in the texts of `dense` or `candidate`."""
    token = steps.token.sel(model=model).transpose("prompt", "step").values
    rows = [row[row >= 0] for row in token]
    loops = [loop(row) for row in rows]
    own = steps.entropy if model == "dense" else steps.entropy_candidate.sel(history="free")
    entropy = own.transpose("prompt", "step").values.astype(float)
    return Degeneration(
        np.array([repetition(row) for row in rows]),
        np.array([period for period, _ in loops]),
        np.array([onset for _, onset in loops]),
        np.array([_collapse(row) for row in entropy]),
        steps.no_stop.sel(model=model).values.astype(float),
    )


def repetition(tokens: np.ndarray) -> float:
    """Share of 4-grams that occurred before; 0 for a text too short to have two."""
    if len(tokens) <= NGRAM:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(tokens, NGRAM)
    return 1 - len(np.unique(grams, axis=0)) / len(grams)


def loop(tokens: np.ndarray) -> tuple[float, float]:
    """Period and onset of the loop that a text ends in: (NaN, NaN) without one."""
    for period in range(1, min(LOOP_PERIOD, len(tokens) // LOOP_TURNS) + 1):
        same = tokens[period:] == tokens[:-period]
        run = len(same) if same.all() else int(same[::-1].argmin())
        if run >= (LOOP_TURNS - 1) * period:
            return float(period), float(len(tokens) - period - run)
    return float("nan"), float("nan")


def _collapse(entropy: np.ndarray) -> float:
    values = entropy[np.isfinite(entropy)]
    if len(values) < COLLAPSED_STEPS:
        return float("nan")
    low = np.lib.stride_tricks.sliding_window_view(values < COLLAPSED_ENTROPY, COLLAPSED_STEPS)
    whole = low.all(-1)
    return float(whole.argmax()) if whole.any() else float("nan")


# --- temperature ---------------------------------------------------------------------------------


def by_temperature(temperatures: xr.Dataset, figure: str = "kl") -> xr.Dataset:
    """Mean of a figure over steps, then prompts, `(history, temperature)`, with its interval."""
    values = temperatures[figure].transpose("prompt", "step", "history", "temperature").values
    values = values.astype(float)
    there = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        per_prompt = np.where(there, values, 0.0).sum(1) / there.sum(1)
    data = _banded(_mean(per_prompt), _picked(per_prompt), ("history", "temperature"))
    coords = {
        "history": temperatures.history.values,
        "temperature": temperatures.temperature.values,
    }
    return xr.Dataset(data, coords=coords)
