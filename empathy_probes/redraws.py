"""The instrument on many scenario samples of one pair whose truth is known.

Every concept's texts, some thousand scenarios, run once through both models of a phantom; that is the population. A
redraw takes n scenarios of each concept without replacement, makes the same kernels, comparisons and judgements as a
study does, and keeps what they said. The truth is the population's own value. Sampling n of N without replacement
makes errors smaller by sqrt(1 - n/N), so intervals are shortened by that factor before they are held against the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int, Int8

from empathy_probes.activations import Activations
from empathy_probes.concepts import Concept
from empathy_probes.contrasts import Contrast, compare_pair
from empathy_probes.decisions import judge
from empathy_probes.errors import InputError
from empathy_probes.kernels import mean_product, pair_strengths

CURVES = ("base", "aligned", "difference", "attenuation", "specific", "band")
DECISIONS = ("", "attenuated", "amplified", "equivalent", "inconclusive")
DRAWS = 1000
# What an interval is forgiven: float32 in its stored ends, and rounding where nothing differs.
ROUNDING = 1e-6
# Numbers in the kernels of the redraws that are compared at once: 16 MB.
CACHED = 2_000_000


@dataclass(frozen=True)
class Sample:
    """All scenarios of one concept in both models, in raw activation units."""

    concept: str
    role: str
    differences: Float[np.ndarray, "model=2 scenario layer d_model"]
    """Label 1 minus label 0."""
    squares: Float[np.ndarray, "model=2 scenario layer"]
    """Mean over the scenario's texts of the squared norm: the rms of any subset follows from it."""

    @property
    def n(self) -> int:
        """Number of scenarios."""
        return int(self.differences.shape[1])

    @cached_property
    def u(self) -> Float[np.ndarray, "model=2 layer"]:
        """U over all scenarios: the population's squared strength."""
        d = np.moveaxis(self.differences.astype(np.float64), 1, -2)
        return mean_product(d, d) / self.squares.astype(np.float64).mean(1)


@dataclass(frozen=True)
class Population:
    """Samples of all targets and controls of one pair."""

    layers: tuple[int, ...]
    samples: tuple[Sample, ...]
    """Targets first."""
    same_model: bool = False
    """Both models have equal weights."""

    def of_role(self, role: str) -> tuple[Sample, ...]:
        """Samples of the targets or of the controls."""
        return tuple(s for s in self.samples if s.role == role)

    @cached_property
    def truth(self) -> Float[np.ndarray, "target layer curve"]:
        """The population's own value of each of `CURVES` but the band, whose truth is that of `specific`."""
        log_keep = {s.concept: _log_keep(s) for s in self.samples}
        controls = np.stack([log_keep[s.concept] for s in self.of_role("control")])
        usable = np.isfinite(controls)
        mean = np.where(usable, controls, 0).sum(0) / np.where(usable.any(0), usable.sum(0), np.nan)
        rows = []
        for sample in self.of_role("target"):
            base, aligned = np.sqrt(np.maximum(sample.u, 0))
            theta = log_keep[sample.concept]
            specific = 0.0 - np.expm1(theta - mean)
            rows.append(
                np.stack([base, aligned, aligned - base, 0.0 - np.expm1(theta), specific, specific], -1)
            )
        return np.stack(rows)


def _log_keep(sample: Sample) -> Float[np.ndarray, " layer"]:
    """½ log(U_a/U_b); exactly 0 where all differences are equal, NaN where the base carries nothing."""
    base, aligned = sample.u
    with np.errstate(divide="ignore", invalid="ignore"):
        theta = 0.5 * np.log(np.maximum(aligned, 0) / base)
    same = (sample.differences[0] == sample.differences[1]).all((0, 2))
    return np.where(base > 0, np.where(same, 0.0, theta), np.nan)


def sample_of(concept: Concept, activations: Sequence[Activations]) -> Sample:
    """Reduce a binary concept's activations in both models.

    Scenarios of one cluster are averaged, as in a study.

    Raises:
        InputError: a scenario does not consist of one text of each label.
    """
    pairs: dict[str, dict[float, int]] = {}
    unit_of: dict[str, str] = {}
    for i, item in enumerate(concept.stimuli.items):
        pairs.setdefault(item.scenario, {})[float(item.label)] = i
        unit_of[item.scenario] = item.unit
    if 2 * len(pairs) != len(concept.stimuli.items) or any(
        set(pair) != {0.0, 1.0} for pair in pairs.values()
    ):
        raise InputError(
            f"the population of '{concept.name}' has {len(concept.stimuli.items)} texts in {len(pairs)} scenarios, expected "
            "one text of each label per scenario; use minimal pairs"
        )
    ones, zeros = (np.array([pair[label] for pair in pairs.values()]) for label in (1.0, 0.0))
    # In the order of their first texts, as everywhere: rows of one table are rows of another.
    units = {unit: i for i, unit in enumerate(dict.fromkeys(unit_of.values()))}
    place = np.array([units[unit] for unit in unit_of.values()])
    share = np.zeros((len(units), len(pairs)))
    share[place, np.arange(len(pairs))] = 1 / np.bincount(place)[place]
    differences, squares = [], []
    for a in activations:
        acts = a.acts - a.acts.mean(-1, keepdims=True) if a.centred else a.acts
        norms = (acts.astype(np.float64) ** 2).sum(-1)
        d = acts[ones] - acts[zeros]
        # An average over one scenario must stay that scenario, bit by bit.
        differences.append(
            d[np.argsort(place)] if len(units) == len(pairs) else np.einsum("us,sld->uld", share, d)
        )
        squares.append(share @ ((norms[ones] + norms[zeros]) / 2))
    return Sample(concept.name, concept.role, np.stack(differences), np.stack(squares))


@dataclass(frozen=True)
class Outcomes:
    """What the instrument said about every target in every redraw of one pair at one n."""

    n: int
    population: Int[np.ndarray, " target"]
    """Scenarios drawn from."""
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    truth: Float[np.ndarray, "target layer curve"]
    controls: Float[np.ndarray, "control layer"]
    """Strength of the population's controls in the base."""
    curves: Float[np.ndarray, "redraw target layer curve value_lower_upper=3"]
    """In the order of `CURVES`."""
    decisions: Int8[np.ndarray, "redraw target layer"]
    """Index into `DECISIONS`."""
    usable: Bool[np.ndarray, "redraw layer"]
    """Whether the instrument used all controls; those that it does not detect it leaves out."""
    minimum_detectable: Float[np.ndarray, "redraw target layer"]
    onset: Bool[np.ndarray, "redraw target layer"]
    """Membership in the onset set."""
    onset_none: Bool[np.ndarray, "redraw target"]
    """"There is no onset" belongs to the set."""

    @property
    def redraws(self) -> int:
        """Number of redraws."""
        return int(self.decisions.shape[0])

    def covers(self) -> Bool[np.ndarray, "redraw target layer curve"]:
        """Which intervals hold the truth; an open end (NaN) holds everything on its side."""
        cut = np.array([name in ("base", "aligned") for name in CURVES])
        of_target, of_control = self.n / self.population[:, None], self.n / self.population.min()
        drawn = np.broadcast_to(of_target[..., None], self.curves.shape[:-1]).copy()
        # What is relative to controls, of which fewer scenarios may be there, errs with both: each by its share of the variance.
        own, whole = (self._width(name) for name in ("attenuation", "specific"))
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.minimum((own / whole) ** 2, 1)
        share = np.where(np.isfinite(share), share, 1.0)
        relative = [CURVES.index("specific"), CURVES.index("band")]
        drawn[..., relative] = (share * of_target + (1 - share) * of_control)[..., None]
        return holds(self.truth, self.curves, drawn, cut, ~cut)

    def _width(self, curve: str) -> Float[np.ndarray, "redraw target layer"]:
        """Of a curve's interval, on the scale of log keep."""
        lower, upper = np.moveaxis(self.curves[..., CURVES.index(curve), 1:].astype(np.float64), -1, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.log1p(-lower) - np.log1p(-upper))

    def beyond(
        self, margin: float
    ) -> tuple[Bool[np.ndarray, "redraw target layer"], Bool[np.ndarray, "redraw target layer"]]:
        """Which bands would lie below and above the margin (attenuated, amplified) if errors were those of fresh scenarios.

        A sample without replacement errs by sqrt(1 - n/N) of that, and decisions on it would look surer than they are: each end of
        the band is moved away from its mean, on the scale of log keep, by what its error lacks. Ends are moved and not the point,
        which is not printed where a contrast may be all gone.
        """
        lower, upper = np.moveaxis(self.curves[..., CURVES.index("band"), 1:].astype(np.float64), -1, 0)
        lacks = 1 / np.sqrt(1 - self.n / self.population.min()) - 1
        return _moved_out(lower, lacks) > margin, _moved_out(upper, lacks) < -margin


def _moved_out(end: Float[np.ndarray, "redraw *place"], by: float) -> Float[np.ndarray, "redraw *place"]:
    """Ends of attenuation, each further from the mean of its place by this part of what it is; blank and open ones as they are."""
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = np.log1p(-end)
    known = np.isfinite(kept)
    mean = np.where(known, kept, 0).sum(0) / np.maximum(known.sum(0), 1)
    return np.where(known, 1 - np.exp(kept + by * np.where(known, kept - mean, 0)), end)


def holds(
    truth: Float[np.ndarray, "*#batch"],
    intervals: Float[np.ndarray, "*batch value_lower_upper=3"],
    drawn: Float[np.ndarray, "*#batch"] | float,
    strength: Bool[np.ndarray, "*#batch"],
    share: Bool[np.ndarray, "*#batch"],
) -> Bool[np.ndarray, "*batch"]:
    """Which intervals hold the truth; an end that is open (NaN) holds everything on its side, one at a bound all up to it.

    Args:
        truth: what is estimated.
        intervals: value and ends; the first axis are redraws.
        drawn: part of the population that a sample is: without replacement, errors are smaller by sqrt(1 - drawn). By how much
            the values are off on average they would be with fresh scenarios as well, and is held against the whole interval.
        strength: cut off at 0 below.
        share: attenuation or cosine, whose upper end 1 says "no bound".
    """
    value, lower, upper = np.moveaxis(intervals.astype(np.float64), -1, 0)
    shorter = np.sqrt(1 - drawn)
    centre = np.where(np.isnan(value), (lower + upper) / 2, value)
    with np.errstate(invalid="ignore"):
        mean = value.mean(0)
        aim = np.where(np.isfinite(mean), mean + shorter * (truth - mean), truth)
    low = np.where(strength & (lower == 0), lower, centre - shorter * (centre - lower))
    high = np.where(share & (upper >= 1), upper, centre + shorter * (upper - centre))
    low, high = np.where(np.isnan(lower), -np.inf, low), np.where(np.isnan(upper), np.inf, high)
    return (low - ROUNDING <= aim) & (aim <= high + ROUNDING)


def check_size(population: int, n: int) -> None:
    """Refuse samples of more than half of the scenarios there are."""
    if population < 2 * n:
        raise InputError(
            f"{population} scenarios are too few to draw {n} from, expected at least {2 * n}; make a larger population"
        )


def redraw(population: Population, n: int, redraws: int, seed: int = 0) -> Outcomes:
    """Judge `redraws` samples of n scenarios per concept.

    Args:
        population: what is drawn from.
        n: scenarios per concept.
        redraws: how many samples.
        seed: of the samples and of the multiplier draws.

    Raises:
        InputError: a concept has fewer than 2 n scenarios.
    """
    check_size(min(s.n for s in population.samples), n)
    targets = [s.concept for s in population.of_role("target")]
    shape = (redraws, len(targets), len(population.layers))
    curves = np.full((*shape, len(CURVES), 3), np.nan, np.float32)
    decisions, detectable = np.zeros(shape, np.int8), np.full(shape, np.nan, np.float32)
    onset, none = np.zeros(shape, bool), np.zeros(shape[:2], bool)
    usable = np.zeros((redraws, shape[2]), bool)
    # Several redraws are compared at once, as so many layers more: as many as fit the processor's cache.
    at_once = max(1, CACHED // (2 * len(population.layers) * n**2))
    for first in range(0, redraws, at_once):
        chosen = range(first, min(first + at_once, redraws))
        rngs = [np.random.default_rng([seed, n, r]) for r in chosen]
        compared = {}
        for s in population.samples:
            rows = np.stack([rng.choice(s.n, n, replace=False) for rng in rngs])
            compared[s.concept] = contrasts_of(s, rows, population)
        for i, r in enumerate(chosen):
            judged = judge(
                [compared[name][i] for name in targets],
                [compared[s.concept][i] for s in population.of_role("control")],
                draws=DRAWS,
                seed=seed + r,
            )
            usable[r] = judged[0].n_controls == len(population.of_role("control"))
            for t, j in enumerate(judged):
                c = compared[j.name][i]
                for k, curve in enumerate(
                    (c.base, c.aligned, c.difference, c.attenuation, j.specific, j.band)
                ):
                    curves[r, t, :, k] = np.stack([curve.value, curve.lower, curve.upper], -1)
                decisions[r, t] = [DECISIONS.index(word) for word in j.decision]
                detectable[r, t] = j.minimum_detectable
                onset[r, t] = np.isin(population.layers, j.onset.members)
                none[r, t] = j.onset.includes_none
    return Outcomes(
        n, np.array([s.n for s in population.of_role("target")]), tuple(targets), population.layers, population.truth,
        np.sqrt(np.maximum([s.u[0] for s in population.of_role("control")], 0)), curves, decisions, usable, detectable, onset, none
    )  # fmt: skip


def contrasts_of(sample: Sample, rows: Int[np.ndarray, "redraw n"], population: Population) -> list[Contrast]:
    """The comparisons a study would make of each of these samples of scenarios."""
    keys = [f"{sample.concept}\x1f{i}" for i in range(rows.shape[1])]
    many, layers = len(population.layers), population.layers
    # The samples stand side by side like layers.
    differences, squares = (
        np.concatenate(list(np.moveaxis(values[:, rows], 1, 0)), axis=2)
        for values in (sample.differences, sample.squares)
    )
    pair = pair_strengths(differences, squares, same_model=population.same_model)
    whole = compare_pair(sample.concept, keys, pair, range(many * len(rows)))
    return [whole.at(slice(i * many, (i + 1) * many), layers) for i in range(len(rows))]
