"""What is judged of a pair of known truth: coverage, bias, false alarms, power, and what each of them must be.

A metric gives one number per redraw: 0 or 1, whose mean is a rate, or an error or a size. A rate that must be consistent with a nominal one
(coverage, false alarms) meets its target where its interval reaches into it; everything else must lie in its target itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from empathy_probes.redraws import CURVES, DECISIONS, Outcomes
from empathy_probes.stats import Estimate

ATTENUATED, AMPLIFIED, EQUIVALENT = (DECISIONS.index(w) for w in ("attenuated", "amplified", "equivalent"))
MARGIN = 0.10
# Strength from which on a block of a phantom is said to carry a concept.
CARRIED = 0.1
# Twins whose residual stream holds exactly what their base's does: everything must be equivalent.
EXACT = ("identical", "rotated", "rescaled", "unsaid")


@dataclass(frozen=True)
class Case:
    """One pair with what the instrument said about it in its redraws."""

    family: str
    architecture: str
    concept: str | None
    """The concept that was attenuated; None where nothing specific was."""
    layer: int | None
    """The block at which."""
    keep: float | None
    """What was to be left of it."""
    outcomes: Outcomes

    @property
    def place(self) -> tuple[int, int]:
        """Indices of the target and the layer that the case is judged at: the planted ones, or the middle block."""
        o = self.outcomes
        layer = o.layers.index(self.layer) if self.layer is not None else len(o.layers) // 2
        return o.targets.index(self.concept) if self.concept is not None else 0, layer

    def truth(self, curve: str) -> Float[np.ndarray, "target layer"]:
        """The population's value of one curve."""
        return self.outcomes.truth[..., CURVES.index(curve)]


@dataclass(frozen=True)
class Target:
    """What a metric must be."""

    least: int | float = -np.inf
    most: int | float = np.inf
    consistent: bool = False
    """It is enough that the interval reaches there."""

    def __str__(self) -> str:
        if np.isinf(self.least):
            return f"≤ {self.most:g}"
        return f"≥ {self.least:g}" if np.isinf(self.most) else f"{self.least:g} to {self.most:g}"

    @staticmethod
    def read(text: str, metric: str) -> Target | None:
        """The target that a row of this metric names."""
        if not text:
            return None
        ends = [float(part) for part in text.strip("≤≥ ").split(" to ")]
        least = -np.inf if text.startswith("≤") else ends[0]
        most = np.inf if text.startswith("≥") else ends[-1]
        return Target(least, most, consistent=metric.startswith("coverage_") or metric == "false_alarm")

    def met_by(self, estimate: Estimate) -> bool:
        """Whether the estimate, or where that is enough its interval, reaches into the target."""
        low, high = (estimate.lower, estimate.upper) if self.consistent else (estimate.value, estimate.value)
        return bool(high >= self.least and low <= self.most)


@dataclass(frozen=True)
class Metric:
    """One number of a cell."""

    measure: Callable[[Case], Float[np.ndarray, " redraw"] | None]
    """One entry per redraw, NaN where it says nothing; None where the metric does not apply."""
    proportion: bool
    """Whether the entries are 0 or 1."""
    target: Callable[[Case], Target | None]


def _coverage(curve: str) -> Callable[[Case], np.ndarray | None]:
    def measure(case: Case) -> np.ndarray | None:
        if case.family in EXACT:
            return None
        t, layer = case.place
        k = CURVES.index(curve)
        lower, upper = case.outcomes.curves[:, t, layer, k, 1:].T
        held = case.outcomes.covers()[:, t, layer, k]
        # Where nothing differs, exactly, an interval without width is no test of an interval, unless it misses.
        shown = ~(np.isnan(lower) & np.isnan(upper)) & ~(held & (upper - lower < 1e-9))
        empty = _empty(case, k)[:, t, layer]
        return np.where(shown, held, np.where(empty, 0.0, np.nan))

    return measure


def _empty(case: Case, k: int) -> Bool[np.ndarray, "redraw target layer"]:
    """Where nothing is compatible with the data, though the base is detected: a miss, not a blank."""
    curves = case.outcomes.curves
    return np.asarray(np.isnan(curves[..., k, 1:]).all(-1) & (curves[..., CURVES.index("base"), 1] > 0))


def _all_at_once(curve: str) -> Callable[[Case], np.ndarray | None]:
    """Whether the intervals of all targets at all layers together hold the truth, where that is defined (`_referred`).

    A redraw in which no layer is left says nothing.
    """

    def measure(case: Case) -> np.ndarray | None:
        if case.family in EXACT:
            return None
        k = CURVES.index(curve)
        unknown = np.isnan(case.truth(curve)) | ~_referred(case)[:, None]
        blank = unknown | np.isnan(case.outcomes.curves[..., k, 1:]).all(-1)
        missed = _empty(case, CURVES.index("attenuation")) & ~unknown
        held = ((case.outcomes.covers()[..., k] | blank) & ~missed).all((1, 2))
        return np.where((blank & ~missed).all((1, 2)), np.nan, held)

    return measure


def _referred(case: Case) -> Bool[np.ndarray, "redraw layer"]:
    """Layers at which all controls are carried, or were all used: truth is relative to all of them."""
    return np.asarray((case.outcomes.controls > CARRIED).all(0) | case.outcomes.usable)


def _error(case: Case) -> np.ndarray | None:
    """Error of the estimated attenuation; of that of the strengths where only a bound is printed: else the rest is a selection."""
    printed = _printed_error(case)
    if printed is None:
        return None
    t, layer = case.place
    base, aligned = (case.outcomes.curves[:, t, layer, CURVES.index(name), 0] for name in ("base", "aligned"))
    with np.errstate(divide="ignore", invalid="ignore"):
        unprinted = np.where(base > 0, 1 - aligned / base, np.nan) - case.truth("attenuation")[t, layer]
    return np.where(np.isnan(printed), unprinted, printed)


def _printed_error(case: Case) -> np.ndarray | None:
    """The same where a point is printed."""
    if case.concept is None:
        return None
    t, layer = case.place
    point = case.outcomes.curves[:, t, layer, CURVES.index("attenuation"), 0]
    return np.asarray(point - case.truth("attenuation")[t, layer])


def _false_alarm(case: Case) -> np.ndarray:
    """Any decision at any layer where the truth is defined and within the margin, also about what was planted at another one."""
    truth = case.truth("specific")
    innocent = (truth <= MARGIN) & (truth >= -MARGIN) & _referred(case)[:, None]
    return np.where(innocent.any((1, 2)), (claims(case.outcomes) & innocent).any((1, 2)), np.nan)


def claims(outcomes: Outcomes) -> Bool[np.ndarray, "redraw target layer"]:
    """Where a change is claimed, or would be if errors were as large as those of fresh scenarios."""
    attenuated, amplified = outcomes.beyond(MARGIN)
    claimed = np.isin(outcomes.decisions, (ATTENUATED, AMPLIFIED))
    return np.asarray(claimed | ((attenuated | amplified) & (outcomes.decisions != 0)))


def _decided(case: Case) -> np.ndarray | None:
    if case.concept is None:
        return None
    t, layer = case.place
    claimed = (case.outcomes.decisions == ATTENUATED) & case.outcomes.beyond(MARGIN)[0]
    return claimed[:, t, layer].astype(float)


def _equivalent(case: Case) -> np.ndarray | None:
    """Every target shown equivalent at every layer that carries it, and nothing else said where none does."""
    if case.family not in EXACT:
        return None
    blank = (case.outcomes.decisions == 0) & (case.truth("base") <= CARRIED)
    return ((case.outcomes.decisions == EQUIVALENT) | blank).all((1, 2)).astype(float)


def _onset(case: Case) -> tuple[np.ndarray, np.ndarray] | None:
    """Whether the onset set holds the first layer beyond the margin, and its size."""
    if case.concept is None:
        return None
    t = case.place[0]
    beyond = np.flatnonzero(case.truth("specific")[t] > MARGIN)
    members = case.outcomes.onset[:, t]
    holds = members[:, beyond[0]] if len(beyond) else case.outcomes.onset_none[:, t]
    return holds.astype(float), members.sum(-1).astype(float)


def two_sided(case: Case) -> np.ndarray | None:
    if case.concept is None:
        return None
    t, layer = case.place
    lower, upper = case.outcomes.curves[:, t, layer, CURVES.index("attenuation"), 1:].T
    return (~np.isnan(lower) & (upper < 1)).astype(float)


def _detectable(case: Case) -> np.ndarray | None:
    if case.concept is None:
        return None
    t, layer = case.place
    return case.outcomes.minimum_detectable[:, t, layer]


def _always(target: Target) -> Callable[[Case], Target | None]:
    return lambda case: target


def _when(target: Target, applies: Callable[[Case], bool]) -> Callable[[Case], Target | None]:
    return lambda case: target if applies(case) else None


def keeps(least: float) -> Callable[[Case], bool]:
    return lambda case: case.keep is not None and case.keep >= least


def _planted_at(n: int) -> Callable[[Case], bool]:
    return lambda case: case.family == "planted" and case.outcomes.n == n


COVERAGE = Target(0.92, 0.98, consistent=True)
FEWEST = 100
"""Redraws from which a rate is held against its target: of fewer, the interval reaches into nearly any."""
METRICS: dict[str, Metric] = {
    **{f"coverage_{curve}": Metric(_coverage(curve), True, _always(COVERAGE)) for curve in CURVES[:4]},
    # The controls of a phantom are a fixed set, but `specific` speaks about controls in general: it may cover more.
    "coverage_specific": Metric(_coverage("specific"), True, _always(Target(0.92, consistent=True))),
    "coverage_band": Metric(_all_at_once("band"), True, _always(Target(0.95, consistent=True))),
    # What simultaneous bands are for: pointwise intervals, asked to hold everything at once.
    "pointwise_band": Metric(_all_at_once("specific"), True, lambda c: None),
    "bias": Metric(_error, False, _when(Target(-0.03, 0.03), keeps(0.25))),
    "rmse": Metric(lambda c: None if (e := _error(c)) is None else e**2, False, lambda c: None),
    "bias_printed": Metric(_printed_error, False, lambda c: None),
    "false_alarm": Metric(_false_alarm, True, _always(Target(most=0.05, consistent=True))),
    "decided": Metric(
        _decided, True,
        _when(Target(0.90), lambda c: c.family == "planted" and c.keep == 0.25 and c.outcomes.n >= 100),
    ),
    "equivalent": Metric(_equivalent, True, _always(Target(0.95))),
    "onset_contains": Metric(lambda c: (o := _onset(c)) and o[0], True, _always(Target(0.95))),
    "onset_size": Metric(lambda c: (o := _onset(c)) and o[1], False, _when(Target(most=3), _planted_at(100))),
    # Judged over all cells together, in `score`.
    "two_sided": Metric(two_sided, True, lambda c: None),
    "minimum_detectable": Metric(_detectable, False, _when(Target(most=0.30), _planted_at(100))),
}  # fmt: skip


METRIC_WORDS = {
    "coverage_base": "Share of redraws whose 95 % interval of the base's strength holds the truth, at the planted block.",
    "coverage_aligned": "The same of the aligned model's strength.",
    "coverage_difference": "The same of the difference of strengths.",
    "coverage_attenuation": "The same of attenuation (pointwise).",
    "coverage_specific": "The same of attenuation beyond the controls. It speaks about controls in general, so it may hold more than 95 %.",
    "coverage_band": "Share of redraws whose simultaneous band holds the truth of all targets at all blocks (that carry all controls) together.",
    "pointwise_band": "The same of the pointwise intervals of specific: what happens without simultaneous bands.",
    "bias": "Mean error of the estimated attenuation at the planted block, of all redraws, also of those that print a bound only.",
    "rmse": "Root mean square of the same error.",
    "bias_printed": "Mean error where a point is printed: the fewer there are, the more they are those that chance made large.",
    "false_alarm": "Share of redraws in which a change is claimed of any target at any block (that carries all controls) where its truth lies within the margin, with errors as large as those of fresh scenarios.",
    "decided": "Share of redraws in which the planted concept is called attenuated at the planted block, with errors as large as those of fresh scenarios.",
    "equivalent": "Share of redraws in which every target is shown equivalent at every block that carries it (pairs that compute the same).",
    "onset_contains": "Share of redraws whose onset set holds the block where the truth first exceeds the margin.",
    "onset_size": "Mean number of blocks in the onset set, of six.",
    "two_sided": "Share of redraws whose interval of attenuation has both ends; judged over all cells of an n that keep half or more.",
    "minimum_detectable": "Mean smallest attenuation that a run of this size would decide with 80 % power.",
    "caught": "Share of draws in which the attack is noticed: the lexical floor beats .9, or texts missing in one model are refused.",
    "says_<question>": "Share of redraws of a whole study with all stages in which encode, use, express, gain, the verdict or the frontier of a transplant is what was planted.",
    "verdict_<word>": "Share of the same redraws in which the ledger gives this verdict.",
    "coverage_<measure>_<column>": "Share of redraws in which this interval of attenuation.csv holds the truth, at the planted block. Truth of d′ and cosine: the whole population, with as many neutral texts as a sample has (mean of 100 draws of them). Truth of AUROC, bits and transfer: their mean over samples of this size.",
}  # fmt: skip


def describe_metric(name: str) -> str:
    """What a metric says, in words; of those that come by measure, question or verdict, what all of them say."""
    patterns = [key for key in METRIC_WORDS if "<" in key and name.startswith(key[: key.index("<")])]
    return METRIC_WORDS[name] if name in METRIC_WORDS else METRIC_WORDS[patterns[0]]
