"""Intervals of two models' strengths and of their difference.

Method. Where a signal is strong, U with its standard error under the root; elsewhere all values of U, from 0 on, that are not
rejected. The difference of weak ones is the range over the 95 % region of both.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from empathy_probes.deviations import Line, deviation, members
from empathy_probes.kernels import KernelPair, combined_variance, is_strong
from empathy_probes.stats import LEVEL, Curve, critical_t, skewed_critical


def strength_interval(pair: KernelPair) -> tuple[Curve, Curve]:
    """Strength sqrt(max(U, 0)) of (base, aligned) with its 95 % interval.

    Where a signal is strong, U +- t se under the root; elsewhere all values of U, from 0 on, that are not rejected, around the
    one at which the test's statistic is at its median (see `middle_theta`).
    """
    t = float(critical_t(pair.n - 1))
    strong = is_strong(pair)
    lines = [_squares(pair, model, t) for model in (0, 1)]
    curves = []
    for model, found in enumerate(members(pair, lines, t)):
        u, reach = pair.u[model], t * pair.se[model]
        # Where U is negative beyond chance nothing is accepted, and 0 is all that is left.
        weak = (np.fmax(x, 0) * lines[model].supposed for x in found)
        there = deviation(pair, 1.0 - model, float(model), np.maximum(u, 0))
        squares = ((u, u + there.below_mean), *zip((u - reach, u + reach), weak, strict=True))
        curves.append(Curve(*(np.sqrt(np.maximum(np.where(strong[model], a, b), 0)) for a, b in squares)))
    return curves[0], curves[1]


def strength_difference(pair: KernelPair, base: Curve, aligned: Curve) -> Curve:
    """Strength(aligned) - strength(base) with a 95 % interval, from the two strengths.

    Delta method where both are strong. Elsewhere the root is too curved, and at 0 cut off: the interval is the
    range of the difference over the 95 % region of the two U-statistics (combining the two single intervals
    covered .80 where the aligned signal is gone).
    """
    value = aligned.value - base.value
    strong = is_strong(pair).all(axis=0)
    safe = np.where(strong, np.sqrt(np.maximum(pair.u, 0)), 1.0)
    reach = critical_t(pair.n - 1) * np.sqrt(combined_variance(pair, -0.5 / safe[0], 0.5 / safe[1]))
    lower, upper = value - reach, value + reach
    if not strong.all():
        weak = _projected_difference(pair, base.lower == 0, aligned.lower == 0)
        lower, upper = (np.where(strong, a, b) for a, b in zip((lower, upper), weak, strict=True))
    # Without noise the projection rounds past the value itself.
    ends = (value, np.fmin(lower, value), np.fmax(upper, value))
    return Curve(*(np.where(pair.identical, 0.0, x) for x in ends))


def _squares(pair: KernelPair, model: int, critical: Float[np.ndarray, "..."] | float) -> Line:
    """U = u of one model for all u from 0 to beyond what can be accepted."""
    n, u, zeta2 = pair.n, pair.u[model], pair.zeta2[model, model]
    here = deviation(pair, 1.0 - model, float(model), u)
    slope = 4 / n * np.divide(abs(pair.triangles[3 * model]), zeta2, out=np.zeros_like(u), where=zeta2 > 0)
    # The variance grows with u by no more than this slope.
    longest = skewed_critical(critical, np.array(np.inf), n - 1)
    most = np.maximum(u, 0) + 1.01 * (longest**2 * slope + longest * np.sqrt(here.variance))
    point = np.divide(u, most, out=np.full_like(u, np.nan), where=(most > 0) & (u >= 0))
    on = [np.stack([np.full_like(u, x), np.zeros_like(u)]) for x in (1.0 - model, float(model))]
    return Line(on[0], on[1], most, point)


def _projected_difference(
    pair: KernelPair, base_gone: np.ndarray, aligned_gone: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Extremes of a - b over strengths a, b >= 0 whose squares lie in the ellipse of the two U-statistics.

    Args:
        pair: the U-statistics.
        base_gone: where 0 is a possible strength of the base.
        aligned_gone: where it is one of the aligned model.
    """
    n = pair.n
    # A strength of 0 lies on the edge of the region, and two errors add up unopposed (one's radius covered .83-.90 there): the
    # region is then the joint one of both, whose tail is that of F(2, n - 1). An aligned strength above 0 needs one's radius.
    joint = np.sqrt((n - 1) * ((1 - LEVEL) ** (-2 / (n - 1)) - 1))
    t = np.where(base_gone, joint, float(critical_t(n - 1)))
    line = _squares(pair, 1, t)
    least, most = (np.sqrt(np.fmax(x, 0) * line.supposed) for x in members(pair, (line,), t)[0])
    inside = least + (most - least) * np.linspace(0, 1, 129).reshape(-1, *[1] * least.ndim)
    low, high = _base_ends(pair, inside, t)
    lower, upper = (inside - high).min(axis=0), (inside - low).max(axis=0)
    if not aligned_gone.any():
        return lower, upper
    (low,), (high,) = _base_ends(pair, np.zeros((1, *least.shape)), np.full_like(t, joint))
    return (
        np.where(aligned_gone, np.fmin(lower, -high), lower),
        np.where(aligned_gone, np.fmax(upper, -low), upper),
    )


def _base_ends(
    pair: KernelPair, a: Float[np.ndarray, "point *batch"], radius: Float[np.ndarray, "*batch"]
) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest strength of the base in the region of this radius, for supposed strengths of the aligned model."""
    n = pair.n
    there = deviation(pair, 0.0, 1.0, a**2)
    z = np.clip(there.beyond(radius, n), -1, 1)
    se = np.maximum(pair.se[0], 1e-150)
    # Like the variance, the covariance is that of the supposed strength: an aligned signal that only chance made large
    # seems to rise and fall with the base's.
    zeta2 = pair.zeta2[1, 1]
    slope = np.divide(pair.triangles[2], zeta2, out=np.zeros_like(zeta2), where=zeta2 > 0)
    first = pair.zeta1[0, 1] - slope * there.value
    covariance = 4 * first / n + 2 * pair.zeta2[0, 1] / (n * (n - 1))
    r = np.clip(covariance / (se * np.sqrt(np.maximum(there.variance, 1e-300))), -1, 1)
    width = np.sqrt((1 - r**2) * (1 - z**2))
    lower, upper = (pair.u[0] - radius * se * (r * z + s * width) for s in (1, -1))
    return np.sqrt(np.maximum(lower, 0)), np.sqrt(np.maximum(upper, 0))
