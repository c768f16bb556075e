"""Numbers with intervals: signed ratios, sign-multiplier draws, folds, means over pairs.

Method. Ratios of signals that may vanish are bounded by inverting the test of aligned = x base (Fieller).
Simultaneous statements multiply each scenario's influence on an estimate by a random sign that is the same for
every layer and concept it enters, and take a quantile of the largest studentised sum.
Everything is float64; NaN stands for a blank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Int8, Num
from scipy import special
from scipy import stats as distributions

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
