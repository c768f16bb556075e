"""Numbers with intervals: signed ratios, sign-multiplier draws, AUROC, folds.

Method. Ratios of signals that may vanish are bounded by inverting the test of aligned = x base (Fieller).
Simultaneous statements multiply each scenario's influence on an estimate by a random sign that is the same for
every layer and concept it enters, and take a quantile of the largest studentised sum. The AUROC is the
Mann-Whitney statistic with a delete-one-scenario variance. Everything is float64; NaN stands for a blank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int, Int8, Num
from scipy import special
from scipy import stats as distributions
from scipy.sparse import csr_array

from empathy_probes.errors import InputError

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """One number with its 95 % interval."""

    value: float
    lower: float
    upper: float
    n: int
    """Independent units (scenarios) behind it."""


@dataclass(frozen=True)
class Curve:
    """Numbers with intervals along leading axes, mostly layers; NaN stands for a blank."""

    value: Float[np.ndarray, "..."]
    lower: Float[np.ndarray, "..."]
    upper: Float[np.ndarray, "..."]

    def at(self, index: int, n: int) -> Estimate:
        """The estimate at one position of a one-axis curve, with its number of units."""
        return Estimate(float(self.value[index]), float(self.lower[index]), float(self.upper[index]), n)

    def cells(self, name: str, at: int | tuple[int, ...]) -> dict[str, float]:
        """A table's columns `name`, `name_lower` and `name_upper` at one position."""
        # Without the sign that a zero may have.
        return {
            name: self.value[at] + 0.0, f"{name}_lower": self.lower[at] + 0.0, f"{name}_upper": self.upper[at] + 0.0
        }  # fmt: skip


def critical_t(degrees: Float[np.ndarray, "..."] | int, level: float = LEVEL) -> Float[np.ndarray, "..."]:
    """Two-sided critical value of Student's t."""
    return np.asarray(special.stdtrit(np.asarray(degrees, dtype=float), 0.5 + level / 2))


def upper_t(
    tail: Float[np.ndarray, "..."] | float, degrees: Num[np.ndarray, "..."] | int
) -> Float[np.ndarray, "..."]:
    """Value that Student's t exceeds with this probability."""
    # The distributions of scipy.stats say the same at fifty times the price per call.
    return np.asarray(-special.stdtrit(np.asarray(degrees, dtype=float), tail))


def as_normal(t: Float[np.ndarray, "..."], degrees: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Normal deviate of the same probability as Student's t."""
    return np.asarray(-np.sign(t) * special.ndtri(special.stdtr(degrees, -abs(t))))


def skewed_critical(
    critical: Float[np.ndarray, "..."] | float,
    skewness: Float[np.ndarray, "..."],
    degrees: int,
) -> Float[np.ndarray, "..."]:
    """Critical value of the longer tail of a standardised statistic, at the error that `critical` has on both sides.

    Pearson's type III by Wilson and Hilferty's cube, stretched as Student's t is against the normal; never below `critical`.
    A sum of squares is no more skewed than a single one, sqrt(8).
    """
    error = 2 * special.stdtr(degrees, -np.asarray(critical, dtype=float))
    z, stretch = -special.ndtri(error), critical / -special.ndtri(error / 2)
    g = np.clip(skewness, 1e-6, np.sqrt(8))
    root = 1 + g * z / 6 - g**2 / 36
    return np.asarray(np.maximum(critical, stretch * 2 / g * (root**2 * root - 1)))


def hull_of_members(
    excess: Callable[[Float[np.ndarray, "..."]], Float[np.ndarray, "..."]],
    point: Float[np.ndarray, "*batch"],
) -> tuple[Float[np.ndarray, "*batch"], Float[np.ndarray, "*batch"]]:
    """Smallest and largest x in [0, 1] with excess(x) <= 0, to 1e-9; both NaN where there is none.

    Args:
        excess: maps x `[... *batch]` to numbers that are positive outside the set.
        point: known to belong to the set, so that the narrowest one is found; NaN where no such point is known.
    """
    ones = (1,) * point.ndim
    grid = np.broadcast_to(np.linspace(0, 1, 65).reshape(-1, *ones), (65, *point.shape))
    grid = np.sort(np.concatenate([grid, np.where(np.isnan(point), 0.0, point)[None]]), axis=0)
    member = (excess(grid) <= 0) | (grid == point)
    both = np.stack([grid, grid[::-1]], 1), np.stack([member, member[::-1]], 1)
    inside, outside = _first_member(*both)
    parts = np.linspace(0, 1, 33).reshape(-1, 1, *ones)
    for _ in range(3):
        fine = outside + (inside - outside) * parts
        member = excess(fine) <= 0
        member[-1] = True
        inside, outside = _first_member(fine, member)
    # Between the last two the excess is as good as straight.
    over_in, over_out = excess(np.stack([inside, outside]))
    step = np.divide(
        over_in, over_in - over_out, out=np.zeros_like(over_in), where=(over_in <= 0) & (over_out > 0)
    )
    ends = inside + (outside - inside) * np.where(np.isfinite(step), step, 0)
    none = ~both[1].any((0, 1))
    return np.where(none, np.nan, ends[0]), np.where(none, np.nan, ends[1])


def _first_member(
    x: Float[np.ndarray, "grid *batch"], member: Bool[np.ndarray, "grid *batch"]
) -> tuple[Float[np.ndarray, "*batch"], Float[np.ndarray, "*batch"]]:
    """The first member along the grid, and the x before it (itself where it is the very first)."""
    found = member.argmax(0)[None]
    return np.take_along_axis(x, found, 0)[0], np.take_along_axis(x, np.maximum(found - 1, 0), 0)[0]


def _real_roots(c2: np.ndarray, c1: np.ndarray, c0: np.ndarray) -> list[np.ndarray]:
    """Both real roots of c2 x^2 + c1 x + c0 without cancellation; NaN where there is none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        q = -0.5 * (c1 + np.where(c1 < 0, -1.0, 1.0) * np.sqrt(c1**2 - 4 * c2 * c0))
        return [np.where(c2 == 0, np.nan, q / c2), np.where(q == 0, 0.0, c0 / q)]


def fieller_ratio(
    base: Float[np.ndarray, "..."],
    aligned: Float[np.ndarray, "..."],
    covariance: Float[np.ndarray, "model=2 model=2 ..."],
    critical: Float[np.ndarray, "..."] | float,
) -> Curve:
    """aligned / base for two correlated estimates that may be of either sign, with Fieller's interval.

    Blank (NaN) where |base| does not exceed `critical` standard errors: the ratio is then not bounded.
    """
    c2 = np.asarray(critical, dtype=float) ** 2
    detected = base**2 > c2 * covariance[0, 0]
    # A base that is detected leaves an upright parabola, whose roots are the ends.
    ends = _real_roots(
        np.asarray(base**2 - c2 * covariance[0, 0], dtype=float),
        np.asarray(2 * (c2 * covariance[0, 1] - aligned * base), dtype=float),
        np.asarray(aligned**2 - c2 * covariance[1, 1], dtype=float),
    )
    ratio = aligned / np.where(detected, base, 1.0)
    lower, upper = np.fmin(np.fmin(*ends), ratio), np.fmax(np.fmax(*ends), ratio)
    return Curve(*(np.where(detected, x, np.nan) for x in (ratio, lower, upper)))


def ratio_of_means(
    numerator: Float[np.ndarray, "*cell unit"],
    denominator: Float[np.ndarray, " unit"],
    critical: float | None = None,
) -> Curve:
    """mean(numerator) / mean(denominator) over the same units, with Fieller's interval.

    Blank where the mean of the denominator is not detected: within `critical` (95 % of t by default) standard errors of 0.
    """
    n, cells = denominator.shape[-1], numerator.shape[:-1]
    above = numerator.reshape(-1, n)
    below = np.broadcast_to(denominator, above.shape)
    spread = [x - x.mean(-1, keepdims=True) for x in (below, above)]
    covariance = np.array([[(a * b).sum(-1) / (n - 1) / n for b in spread] for a in spread])
    critical = float(critical_t(n - 1)) if critical is None else critical
    curve = fieller_ratio(below.mean(-1), above.mean(-1), covariance, critical)
    return Curve(*(x.reshape(cells) for x in (curve.value, curve.lower, curve.upper)))


def mean_interval(values: Float[np.ndarray, "... unit"]) -> Curve:
    """Mean over scenarios with a 95 % t interval."""
    n = values.shape[-1]
    centre = values.mean(-1)
    reach = critical_t(n - 1) * values.std(-1, ddof=1) / np.sqrt(n)
    return Curve(np.asarray(centre), np.asarray(centre - reach), np.asarray(centre + reach))


# ---------------------------------------------------------------- simultaneous statements


def unit_signs(keys: Sequence[str], draws: int, seed: int) -> Int8[np.ndarray, "draws n"]:
    """Random signs, one column per unit name: equal names get equal signs in every call with one seed."""
    # An extendable hash is a random stream keyed by the name, without a generator per scenario.
    streams = [
        hashlib.shake_256(f"{seed}\x1fsign\x1f{key}".encode()).digest((draws + 7) // 8) for key in keys
    ]
    bits = np.unpackbits(np.stack([np.frombuffer(stream, np.uint8) for stream in streams]), axis=1)
    return bits[:, :draws].T.astype(np.int8) * 2 - 1


def unit_normals(keys: Sequence[str], draws: int, seed: int) -> Float[np.ndarray, "draws n"]:
    """Standard normal draws, one column per name, keyed like `unit_signs`."""
    words = [hashlib.sha256(f"{seed}\x1fnormal\x1f{key}".encode()).digest()[:8] for key in keys]
    columns = [np.random.default_rng(int.from_bytes(word, "big")).standard_normal(draws) for word in words]
    return np.stack(columns, axis=1)


def studentised_sums(
    influence: Float[np.ndarray, "cell n"], signs: Int8[np.ndarray, "draws n"]
) -> Float[np.ndarray, "draws cell"]:
    """t-statistics of the sign-multiplied influences; cells without variance contribute 0.

    M = X / sqrt((sum g^2 - X^2/n) n/(n-1)) with X = sum_s w_s g_s: each draw is divided by its own spread.
    """
    n = influence.shape[-1]
    sums = signs.astype(float) @ influence.T
    squares = (influence**2).sum(-1)
    # Rounding can leave the residual at -1e-17 when all of a cell's variance sits in one unit.
    residual = np.maximum(squares - sums**2 / n, 1e-12 * squares)
    return np.divide(sums, np.sqrt(residual * n / (n - 1)), out=np.zeros_like(sums), where=squares > 0)


def largest_quantile(
    draws: Float[np.ndarray, "draws cell"], level: float = LEVEL, one_sided: bool = False
) -> float:
    """Quantile of the largest (absolute, unless one-sided) entry over cells; 0 when there is no cell."""
    if draws.shape[1] == 0:
        return 0.0
    largest = draws.max(axis=1) if one_sided else abs(draws).max(axis=1)
    return float(np.quantile(largest, level, method="higher"))


def adjusted_p(
    draws: Float[np.ndarray, "draws cell"], statistics: Float[np.ndarray, " m"]
) -> Float[np.ndarray, " m"]:
    """(1 + #{draws : max over cells |M| >= |t|}) / (draws + 1) for each statistic t."""
    largest = np.sort(abs(draws).max(axis=1)) if draws.shape[1] else np.zeros(len(draws))
    # The tolerance keeps an exact tie (t equal to its own draw) a tie after rounding.
    beyond = len(largest) - np.searchsorted(largest, abs(statistics) * (1 - 1e-12), side="left")
    return np.where(np.isnan(statistics), np.nan, (1 + beyond) / (len(largest) + 1))


# ---------------------------------------------------------------- folds and counts


def grouped_folds(groups: Sequence[str], n_folds: int, seed: int = 0) -> Int[np.ndarray, " n"]:
    """Fold of every item, all items of a group in one fold, independent of the order of the items.

    Raises InputError with fewer groups than folds.
    """
    names = sorted({str(group) for group in groups})
    if not 2 <= n_folds <= len(names):
        raise InputError(
            f"{n_folds} folds were asked of {len(names)} scenarios, expected 2 to {len(names)}: "
            "use fewer folds or more scenarios"
        )
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed}\x1f{name}".encode()).digest())
    fold = {name: position % n_folds for position, name in enumerate(order)}
    return np.array([fold[str(group)] for group in groups])


def binomial_interval(successes: int, trials: int) -> Estimate:
    """Proportion with its 95 % Wilson interval."""
    interval = distributions.binomtest(successes, trials).proportion_ci(LEVEL, method="wilson")
    return Estimate(successes / trials, float(interval.low), float(interval.high), trials)


# ---------------------------------------------------------------- means over pairs


def hoeffding_components(
    rows: Float[np.ndarray, "kernel *batch n"], products: Float[np.ndarray, "kernel kernel *batch"]
) -> tuple[
    Float[np.ndarray, "kernel *batch"],
    Float[np.ndarray, "kernel *batch n"],
    Float[np.ndarray, "kernel kernel *batch"],
    Float[np.ndarray, "kernel kernel *batch"],
]:
    """Values, influences and the covariance components zeta_1, zeta_2 of the means of symmetric kernels over different units.

    Args:
        rows: sums of the kernels' rows, without the diagonal.
        products: sums of the products of every two kernels, likewise.
    """
    n = rows.shape[-1]
    total = rows.sum(-1)
    value = total / (n * (n - 1))
    influence = (rows / (n - 1) - value[..., None]) * (n - 1) / (n - 2)
    # The doubly centred kernel has zero row sums, hence sum(k~ l~) = sum(k l) - 2 sum(r q)/(n-2) + S R/((n-1)(n-2)).
    products = products - 2 * np.einsum("i...s,j...s->ij...", rows, rows) / (n - 2)
    products += np.einsum("i...,j...->ij...", total, total) / ((n - 1) * (n - 2))
    zeta2 = products / (n * (n - 3))
    spread = np.einsum("i...s,j...s->ij...", influence, influence) / (n - 1)
    return value, influence, spread - zeta2 / (n - 2), zeta2


# ---------------------------------------------------------------- AUROC


def auroc(
    scores: Float[np.ndarray, "... n"], labels: Int[np.ndarray, "*category n"]
) -> Float[np.ndarray, "..."]:
    """Probability that a label-1 item scores above a label-0 item, ties counting one half.

    Labels with a row per category (1 in it, 0 in another) go with scores `[... category n]`: the mean over categories.
    """
    labels = np.asarray(labels)
    if labels.ndim == 2:
        return np.mean([auroc(scores[..., c, :], row) for c, row in enumerate(labels)], axis=0)
    positive = labels == 1
    p, q = _both_counts(positive)
    # Of the ranks of the positives, what lies above those they would have if all were last (Mann and Whitney).
    rank = distributions.rankdata(scores, axis=-1)[..., positive]
    return (rank.sum(-1) - p * (p + 1) / 2) / (p * q)


def smooth_auroc(
    scores: Float[np.ndarray, "... category n"],
    labels: Int[np.ndarray, "category n"],
    kept: Float[np.ndarray, "... n"],
) -> Float[np.ndarray, "..."]:
    """Mean AUROC over categories of the items `kept` (1, others 0), in which a score counts as spread out evenly around itself.

    A win is no step but a ramp, of standard deviation s m^(-1/3) with s that of the scores of m items within labels: the order of a
    kernel that estimates a distribution function (Azzalini 1981). AUROC hardly changes by it, but how two scenarios change it
    together does, which is mostly steps otherwise. In O(m log m).
    """
    found = []
    for c, row in enumerate(labels):
        positive = row == 1
        _both_counts(positive)
        # Less one of them, so that equal ones are 0 whatever is summed.
        x = scores[..., c, :] - scores[..., c, :1]
        ramp = _ramp(x, positive, kept)
        one, zero = ((x[..., side], kept[..., side]) for side in (positive, ~positive))
        wins = _summed_excess(one, zero, ramp) - _summed_excess(one, zero, -ramp)
        found.append(wins / (2 * ramp[..., 0] * one[1].sum(-1) * zero[1].sum(-1)))
    return np.asarray(np.mean(found, axis=0))


def _ramp(
    x: Float[np.ndarray, "*batch n"], positive: Bool[np.ndarray, " n"], kept: Float[np.ndarray, "*#batch n"]
) -> Float[np.ndarray, "*batch 1"]:
    """How far a score lies above another at least that it surely wins, in `smooth_auroc`."""
    squares = 0.0
    for side in (positive, ~positive):
        own, weight = x[..., side], kept[..., side]
        mean = (own * weight).sum(-1, keepdims=True) / weight.sum(-1, keepdims=True)
        squares = squares + ((own - mean) ** 2 * weight).sum(-1)
    m = kept.sum(-1)
    # Scores that do not vary within labels: a step, but for rounding.
    ramp = np.maximum(np.sqrt(3 * squares / m) * m ** (-1 / 3), 1e-6 * np.ptp(x, axis=-1))
    return np.where(ramp > 0, ramp, 1.0)[..., None]


def _summed_excess(
    positive: tuple[np.ndarray, np.ndarray], negative: tuple[np.ndarray, np.ndarray], shift: np.ndarray
) -> Float[np.ndarray, "..."]:
    """Weighted sum over pairs of what a positive score and the shift exceed a negative one by, where they do."""
    (x, one), (y, zero) = positive, negative
    y = y - shift
    shape = np.broadcast_shapes(x.shape[:-1], one.shape[:-1])
    values = np.concatenate([np.broadcast_to(v, (*shape, v.shape[-1])) for v in (x, y)], -1)
    weights = np.concatenate([np.broadcast_to(w, (*shape, w.shape[-1])) for w in (one, zero)], -1)
    order = np.argsort(values, axis=-1)
    upper = order < x.shape[-1]
    values, weights = (np.take_along_axis(a, order, -1) for a in (values, weights))
    below = np.where(upper, 0.0, weights)
    won = values * np.cumsum(below, -1) - np.cumsum(below * values, -1)
    return np.asarray((np.where(upper, weights, 0.0) * won).sum(-1))


def correlation(
    scores: Float[np.ndarray, "... n"],
    values: Float[np.ndarray, "*draws n"],
    kept: Float[np.ndarray, "... n"] | None = None,
) -> Float[np.ndarray, "..."]:
    """Pearson's correlation of scores with graded labels, of all or of the items `kept`; 0 where either does not vary."""
    weight = np.ones(values.shape[-1]) if kept is None else kept
    many = weight.sum(-1, keepdims=True)
    x, y = (a - (a * weight).sum(-1, keepdims=True) / many for a in (scores, values))
    size = np.sqrt((x**2 * weight).sum(-1) * (y**2 * weight).sum(-1))
    return np.divide((x * y * weight).sum(-1), size, out=np.zeros_like(size), where=size > 0)


def d_prime(area: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Separation in standard deviations that gives this AUROC: sqrt(2) Phi^-1(AUROC)."""
    return np.asarray(np.sqrt(2) * distributions.norm.ppf(area))


def widened(share: Float[np.ndarray, "..."], widen: float) -> Float[np.ndarray, "..."]:
    """How many times as wide an interval over scenarios must be whose scores were learnt from the same scenarios.

    `share` is what the scores tell of what there is to tell: (2 AUROC - 1)^2, r^2. At 0 it is `widen`; a probe
    that reads everything does so whichever scenarios it learns from, and with one factor for all, intervals of strong
    readings held the truth in .99-1.00 (docs/simulations).
    """
    return 1 + (widen - 1) * (1 - np.clip(share, 0, 1))


def _placements(
    scores: Float[np.ndarray, "... n"], labels: Int[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, "... positive"], Float[np.ndarray, "... negative"]]:
    """Share of the other label that each item beats (for negatives: is beaten by), from mid-ranks."""
    positive = labels == 1
    p, q = _both_counts(positive)
    rank = distributions.rankdata(scores, axis=-1)
    up = rank[..., positive] - distributions.rankdata(scores[..., positive], axis=-1)
    down = rank[..., ~positive] - distributions.rankdata(scores[..., ~positive], axis=-1)
    return up / q, 1 - down / p


def _both_counts(positive: Bool[np.ndarray, " n"]) -> tuple[int, int]:
    p, q = int(positive.sum()), int((~positive).sum())
    if p == 0 or q == 0:
        raise InputError(f"{p} items have label 1 and {q} label 0, expected both: give texts of each label")
    return p, q


@dataclass(frozen=True)
class Jackknife:
    """How well something is read, and the same with each unit left out in turn."""

    value: Float[np.ndarray, "..."]
    left_out: Float[np.ndarray, "... unit"]
    pairs: Float[np.ndarray, "... unit"] | None = None
    """n times what units and the next on a ring do to it together beyond both alone (`leaving_out.LeftOut`), where that is known."""

    @property
    def units(self) -> int:
        """How many are left out in turn: scenarios."""
        return self.left_out.shape[-1]

    @property
    def critical(self) -> float:
        """Student's 97.5 % point for a standard error from so many units."""
        return float(critical_t(self.units - 1))

    @property
    def single(self) -> Float[np.ndarray, "..."]:
        """Sum of squares of what units do to it alone: its variance, were nothing joint."""
        return np.asarray((self.units - 1) * self.left_out.var(-1))

    @property
    def joint(self) -> Float[np.ndarray, "..."]:
        """Sum of squares of what units do to it in pairs, on the same scale; 0 where that is not known."""
        if self.pairs is None:
            return np.zeros_like(self.single)
        return np.asarray((self.units - 1) / (2 * self.units) * (self.pairs**2).mean(-1))

    @property
    def variance(self) -> Float[np.ndarray, "..."]:
        """Squared standard error; what units do together is counted once where `pairs` are known."""
        return np.asarray(self.single * counted_once(self.single, self.joint))

    def __sub__(self, other: Jackknife) -> Jackknife:
        """The difference of two values of which the same units were left out."""
        together = None if self.pairs is None or other.pairs is None else self.pairs - other.pairs
        return Jackknife(self.value - other.value, self.left_out - other.left_out, together)


def counted_once(
    single: Float[np.ndarray, "..."], pairs: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """By what the variance that single units tell is multiplied, so that what several do together counts once.

    What k units do together single ones count k times (Efron and Stein 1981), and pairs C(k, 2) times. With J and P, the
    variance lies between J² / (J + 2 P), by Cauchy and Schwarz, and J. J - P / 2 would be right if all that is joint were of order four;
    J² / (J + P / 2) is the same where that is little, and never below 0. On pairs of known truth it is right where texts differ in little
    else, and up to a third too much where anything may differ; what takes off more is too little there (docs/simulations).
    """
    total = single + pairs / 2
    return np.divide(single, total, out=np.ones_like(total), where=total > 0)


def leave_one_out(
    scores: Float[np.ndarray, "... n"], labels: Int[np.ndarray, "*category n"], groups: Sequence[str]
) -> Jackknife:
    """AUROC, or its mean over categories, with each scenario left out in turn; the scores stay as they are."""
    labels = np.asarray(labels)
    if labels.ndim == 2:
        each = [leave_one_out(scores[..., c, :], row, groups) for c, row in enumerate(labels)]
        value, left_out = (np.mean([getattr(x, name) for x in each], 0) for name in ("value", "left_out"))
        return Jackknife(value, left_out)
    up, down = _placements(scores, labels)
    positive = labels == 1
    p, q = up.shape[-1], down.shape[-1]
    unit = np.unique([str(group) for group in groups], return_inverse=True)[1]
    n_units = int(unit.max()) + 1
    ones, one = _slots(unit[positive], n_units)
    zeros, zero = _slots(unit[~positive], n_units)
    mine, others = scores[..., positive][..., ones], scores[..., ~positive][..., zeros]
    own = (np.sign(mine[..., :, None] - others[..., None, :]) / 2 + 0.5) * one[:, :, None] * zero[:, None, :]
    lost = (up[..., ones] * one).sum(-1) * q + (down[..., zeros] * zero).sum(-1) * p - own.sum((-2, -1))
    wins = up.sum(axis=-1) * q
    left_out = (wins[..., None] - lost) / ((p - one.sum(-1)) * (q - zero.sum(-1)))
    return Jackknife(wins / (p * q), left_out)


def _slots(
    unit: Int[np.ndarray, " n"], n_units: int
) -> tuple[Int[np.ndarray, "unit most"], Bool[np.ndarray, "unit most"]]:
    """Where each unit's items stand, filled up to the most that a unit has, and which places are not filling."""
    counts = np.bincount(unit, minlength=n_units)
    real = np.arange(counts.max()) < counts[:, None]
    places = np.zeros(real.shape, int)
    places[real] = np.argsort(unit, kind="stable")
    return places, real


def leave_one_out_correlations(
    scores: Float[np.ndarray, "... n"], values: Float[np.ndarray, " n"], groups: Sequence[str]
) -> Jackknife:
    """Correlation with each scenario left out in turn."""
    unit = np.unique([str(group) for group in groups], return_inverse=True)[1]
    left_out = [correlation(scores[..., unit != s], values[unit != s]) for s in range(unit.max() + 1)]
    return Jackknife(correlation(scores, values), np.stack(left_out, -1))


def _covariance(first: Jackknife, second: Jackknife) -> Float[np.ndarray, "..."]:
    """Jackknife covariance; where pairs are known, what the variances of both and of their difference leave for it."""
    if first is second:
        return first.variance
    if first.pairs is not None and second.pairs is not None:
        shared = (first.variance + second.variance - (second - first).variance) / 2
        most = np.sqrt(first.variance * second.variance)
        return np.asarray(np.clip(shared, -most, most))
    n = first.left_out.shape[-1]
    a, b = (x.left_out - x.left_out.mean(axis=-1, keepdims=True) for x in (first, second))
    return np.asarray((n - 1) / n * (a * b).sum(axis=-1))


def _imaginary(first: Jackknife, second: Jackknife) -> Float[np.ndarray, "..."]:
    """What one imaginary scenario at chance adds to the covariance.

    At AUROC 1 no scenario can move the estimate and the plain jackknife says "no error"; the imaginary one says
    "not more than about 3.6/n below 1", the rule of three. At 0.5 it adds nothing.
    """
    return (first.value - 0.5) * (second.value - 0.5) / first.units**2


def pair_variance(
    base: Float[np.ndarray, "... n"],
    aligned: Float[np.ndarray, "... n"],
    labels: Int[np.ndarray, "*category n"],
    groups: Sequence[str],
    *,
    beyond_ramps: bool = False,
) -> Float[np.ndarray, "..."]:
    """zeta_2 of AUROC(aligned) - AUROC(base): the variance of what a pair of scenarios tells of it beyond its two members.

    An AUROC is a mean over pairs; two models that sort nearly alike differ in single pairs, and that is most of what there is.
    Scores and labels as in `auroc`; fewer than four scenarios tell nothing of it (0). `beyond_ramps`: of what `smooth_auroc` does
    not see of it.
    """
    rows = np.atleast_2d(np.asarray(labels)) == 1
    shape = base.shape[:-1] if np.ndim(labels) == 1 else base.shape[:-2]
    scores = [x.reshape(-1, len(rows), x.shape[-1]) for x in (base, aligned)]
    unit = np.unique([str(group) for group in groups], return_inverse=True)[1]
    n = int(unit.max()) + 1
    found = np.zeros(len(scores[0]))
    for i in range(len(found) if n > 3 else 0):
        pairs = np.zeros((n, n))
        for c, positive in enumerate(rows):
            wins = []
            for x in scores:
                lead = x[i, c][positive][:, None] - x[i, c][~positive]
                wins.append(np.sign(lead, dtype=np.float64))
                if beyond_ramps:
                    wins[-1] -= np.clip(lead / _ramp(x[i, c], positive, np.ones(len(positive))), -1, 1)
            one, zero = (_membership(unit[side], n) for side in (positive, ~positive))
            pairs += zero @ (one @ (wins[1] - wins[0])).T * (n / one.shape[1] * n / zero.shape[1])
        # Half of the difference of signs, half for both orders, and the mean over categories.
        pairs = (pairs + pairs.T) / (4 * len(rows))
        np.fill_diagonal(pairs, 0)
        zeta2 = hoeffding_components(pairs.sum(-1)[None], (pairs**2).sum()[None, None])[3]
        found[i] = max(zeta2.item(), 0)
    return found.reshape(shape)


def _membership(unit: Int[np.ndarray, " m"], n: int) -> csr_array:
    return csr_array((np.ones(len(unit)), (unit, np.arange(len(unit)))), shape=(n, len(unit)))


def _shared(
    base: Jackknife, aligned: Jackknife, pairs: Float[np.ndarray, "..."] | float
) -> Float[np.ndarray, "..."]:
    """Covariance of two areas such that their difference has the variance of a mean over pairs of scenarios.

    The jackknife counts about twice what pairs tell beyond their members (Efron and Stein 1981, The jackknife estimate of
    variance): intervals of two all but equal models were 1.2 to 1.6 times too wide (docs/simulations). A smooth one does not
    see them at all.
    """
    n = base.units
    covariance = _covariance(base, aligned)
    if n < 4:
        return covariance
    if base.pairs is not None:
        return np.asarray(covariance - np.asarray(pairs) / (n * (n - 1)))
    total = _covariance(base, base) + _covariance(aligned, aligned) - 2 * covariance
    least = 2 * pairs / (n * (n - 1))
    excess = np.clip(2 * np.asarray(pairs) / ((n - 1) * (n - 2)), 0, np.maximum(total - least, 0))
    return np.asarray(covariance + excess / 2)


def _area_reach(jackknife: Jackknife, widen: float) -> Float[np.ndarray, "..."]:
    """Half of a 95 % interval, on the area's own scale."""
    variance = jackknife.variance + _imaginary(jackknife, jackknife)
    return np.asarray(jackknife.critical * np.sqrt(variance) * _area_factor(jackknife, widen))


def _area_factor(jackknife: Jackknife, widen: float) -> Float[np.ndarray, "..."]:
    return widened((2 * jackknife.value - 1) ** 2, widen)


def _widened_shared(
    base: Jackknife, aligned: Jackknife, pairs: Float[np.ndarray, "..."] | float, widen: float
) -> Float[np.ndarray, "..."]:
    """Covariance of two widened errors, whose luck of training is taken to be shared as far as what their texts tell."""
    return np.asarray(
        _shared(base, aligned, pairs) * _area_factor(base, widen) * _area_factor(aligned, widen)
    )


def _area_at(
    jackknife: Jackknife, reach: Float[np.ndarray, "..."], arm: Float[np.ndarray, "..."] | float
) -> Float[np.ndarray, "..."]:
    """The area `arm` times the reach away, which is taken on the logit scale.

    On the way towards chance the start moves to a value shrunk by one imaginary scenario: that keeps the end honest at 0 and 1;
    at the other end it would cut off the truth. It moves by as much as the error is that scenario's: all the way at 0 and 1,
    hardly where many pairs are sorted wrongly and their spread says enough.
    """
    value, n = jackknife.value, jackknife.units
    imaginary, seen = _imaginary(jackknife, jackknife), _covariance(jackknife, jackknife)
    total = imaginary + seen
    share = np.divide(imaginary, total, out=np.zeros_like(total), where=total > 0)
    towards = np.clip(np.where(value >= 0.5, -1, 1) * arm, 0, 1) * share
    start = value + ((n * value + 0.5) / (n + 1) - value) * towards
    inside = (start > 0) & (start < 1)
    x = np.where(inside, start, 0.5)
    return np.where(inside, special.expit(special.logit(x) + arm * reach / (x * (1 - x))), start)


def area_interval(jackknife: Jackknife, widen: float = 1.0) -> Curve:
    """AUROC with a 95 % interval; see `auroc_interval`."""
    value, reach = jackknife.value, _area_reach(jackknife, widen)
    lower, upper = (_area_at(jackknife, reach, arm) for arm in (-1.0, 1.0))
    return Curve(value, np.fmin(lower, value), np.fmax(upper, value))


def auroc_interval(
    scores: Float[np.ndarray, "... n"],
    labels: Int[np.ndarray, "*category n"],
    groups: Sequence[str],
    widen: float = 1.0,
) -> Curve:
    """AUROC (labels as in `auroc`) with a 95 % delete-one-scenario interval, made up to `widen` times as wide.

    So much at chance; scores that sort everything depend on nothing else (`widened`).
    The ends lie on the logit scale, where the error near the ceiling is closer to normal than on the AUROC's own.
    """
    return area_interval(leave_one_out(scores, labels, groups), widen)


def auroc_difference(
    base: Float[np.ndarray, "... n"],
    aligned: Float[np.ndarray, "... n"],
    labels: Int[np.ndarray, "*category n"],
    groups: Sequence[str],
    widen: float = 1.0,
) -> Curve:
    """AUROC(aligned) - AUROC(base) on the same items with a 95 % interval: its range over both errors together.

    Each area moves along its own skewed interval, as far as a difference needs it (the ellipse whose sides are those intervals).
    Recovered from the ends of the two alone (MOVER), the longer arm towards chance stays even where two models move as
    one: intervals .039 wide of two all but equal models at AUROC .9 with 60 scenarios, now .006 (docs/simulations).
    """
    same = (base == aligned).all(tuple(range(-labels.ndim, 0)))
    pair = [leave_one_out(scores, labels, groups) for scores in (base, aligned)]
    return area_difference(pair[0], pair[1], same, pair_variance(base, aligned, labels, groups), widen)


def area_difference(
    base: Jackknife,
    aligned: Jackknife,
    same: Bool[np.ndarray, "..."],
    pairs: Float[np.ndarray, "..."] | float = 0.0,
    widen: float = 1.0,
) -> Curve:
    """AUROC(aligned) - AUROC(base), exactly 0 where they are the `same`; see `auroc_difference`. `pairs`: `pair_variance`."""
    pair = base, aligned
    # At the ceiling nothing varies, and the imaginary scenario may be another one in each model.
    own = [np.maximum(_covariance(x, x), _imaginary(x, x)) * _area_factor(x, widen) ** 2 for x in pair]
    size, shared = np.sqrt(own[0] * own[1]), _widened_shared(*pair, pairs, widen)
    r = np.clip(np.divide(shared, size, out=np.zeros_like(size), where=size > 0), -1, 1)
    turn = np.linspace(0, 2 * np.pi, 129).reshape(-1, *[1] * r.ndim)
    arms = np.cos(turn), r * np.cos(turn) + np.sqrt(1 - r**2) * np.sin(turn)
    ends = [_area_at(x, _area_reach(x, widen), arm) for x, arm in zip(pair, arms, strict=True)]
    found, difference = ends[1] - ends[0], aligned.value - base.value
    lower, upper = np.fmin(found.min(0), difference), np.fmax(found.max(0), difference)
    return Curve(*(np.where(same, 0.0, x) for x in (difference, lower, upper)))


def correlation_interval(
    scores: Float[np.ndarray, "... n"],
    values: Float[np.ndarray, " n"],
    groups: Sequence[str],
    widen: float = 1.0,
) -> Curve:
    """Correlation of scores with graded labels, 95 % delete-one-scenario interval on Fisher's scale, widened likewise."""
    return fisher_interval(leave_one_out_correlations(scores, values, groups), widen)


def fisher_interval(found: Jackknife, widen: float = 1.0) -> Curve:
    """Correlation with a 95 % interval; see `correlation_interval`."""
    z = np.arctanh(np.clip(found.value, -1 + 1e-12, 1 - 1e-12))
    # On Fisher's scale itself: near 1 its derivative would exaggerate a change that is not small against 1 - r.
    moved = replace(found, left_out=np.arctanh(np.clip(found.left_out, -1 + 1e-12, 1 - 1e-12)))
    variance = moved.single * counted_once(found.single, found.joint)
    reach = found.critical * np.sqrt(variance) * widened(found.value**2, widen)
    return Curve(found.value, np.tanh(z - reach), np.tanh(z + reach))


def correlation_difference(
    base: Float[np.ndarray, "... n"],
    aligned: Float[np.ndarray, "... n"],
    values: Float[np.ndarray, " n"],
    groups: Sequence[str],
    widen: float = 1.0,
) -> Curve:
    """Correlation(aligned) - correlation(base) on the same items, paired 95 % delete-one-scenario interval."""
    pair = [leave_one_out_correlations(scores, values, groups) for scores in (base, aligned)]
    return paired_difference(pair[0], pair[1], widen)


def paired_difference(base: Jackknife, aligned: Jackknife, widen: float = 1.0) -> Curve:
    """Correlation(aligned) - correlation(base); see `correlation_difference`."""
    found = aligned - base
    reach = found.critical * np.sqrt(found.variance)
    reach *= widened(np.minimum(base.value**2, aligned.value**2), widen)
    return Curve(found.value, found.value - reach, found.value + reach)


def area_attenuation(
    base: Jackknife,
    aligned: Jackknife,
    same: Bool[np.ndarray, "..."],
    pairs: Float[np.ndarray, "..."] | float = 0.0,
    widen: float = 1.0,
) -> tuple[Curve, Bool[np.ndarray, "..."]]:
    """1 - d'(aligned) / d'(base) with Fieller's 95 % interval, and where both AUROCs exceed 0.98 (ceiling).

    Blank where either AUROC is 0 or 1 (d' is infinite) or the base is not above chance; exactly 0 where both are the `same`.
    """
    pair = base, aligned
    raw = np.stack([x.value for x in pair])
    finite = ((raw > 0) & (raw < 1)).all(axis=0)
    area = np.where(finite, raw, 0.75)
    slope = np.sqrt(2) / distributions.norm.pdf(distributions.norm.ppf(area))
    factor = [_area_factor(x, widen) for x in pair]
    shared = _widened_shared(base, aligned, pairs, widen)
    covariance = [
        [_covariance(base, base) * factor[0] ** 2, shared],
        [shared, _covariance(aligned, aligned) * factor[1] ** 2],
    ]
    cells = [
        [
            (covariance[i][j] + _imaginary(a, b) * factor[i] * factor[j]) * slope[i] * slope[j]
            for j, b in enumerate(pair)
        ]
        for i, a in enumerate(pair)
    ]
    ratio = fieller_ratio(d_prime(area[0]), d_prime(area[1]), np.array(cells), base.critical)
    # Below chance there is nothing to attenuate either, however surely it is below.
    shown = finite & (raw[0] > 0.5)
    ends = (1 - ratio.value, 1 - ratio.upper, 1 - ratio.lower)
    curve = Curve(*(np.where(same, 0.0, np.where(shown, x, np.nan)) for x in ends))
    return curve, np.asarray((raw > 0.98).all(axis=0))
