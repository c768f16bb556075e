"""What of a strength is kept: the ratio of two models' strengths, its logarithm theta, and their intervals.

Method. theta = log(U_aligned / U_base) / 2. Where both signals are strong its interval is its own, in closed form; where one
is weak it is the set of all ratios that the test of U_aligned = lambda U_base does not reject (Fieller).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from empathy_probes.deviations import Line, cubic, deviation, members
from empathy_probes.kernels import KernelPair, combined, combined_variance, hoeffding_variance, is_strong


@dataclass(frozen=True)
class LogRatio:
    """theta = log(U_aligned / U_base) / 2, the logarithm of what is kept; NaN where either U is not positive."""

    theta: Float[np.ndarray, "..."]
    se: Float[np.ndarray, "..."]
    influence: Float[np.ndarray, "... n"]


def log_ratio(pair: KernelPair) -> LogRatio:
    """Logarithm of the ratio of two strengths; exactly 0 with se 0 where the kernels are identical."""
    positive = (pair.u > 0).all(axis=0) & ~pair.identical
    u = np.where(positive, pair.u, 1.0)
    theta = 0.5 * (np.log(u[1]) - np.log(u[0]))
    se = np.sqrt(combined_variance(pair, -0.5 / u[0], 0.5 / u[1]))
    influence = 0.5 * (pair.influence[1] / u[1][..., None] - pair.influence[0] / u[0][..., None])
    blank = np.where(pair.identical, 0.0, np.nan)
    return LogRatio(
        np.where(positive, theta, blank),
        np.where(positive, se, blank),
        np.where(positive[..., None], influence, blank[..., None]),
    )


def variance_at(pair: KernelPair, keep: Float[np.ndarray, "*#batch"]) -> Float[np.ndarray, "*batch"]:
    """Variance of theta had the aligned model kept this much of the base's signal, and scenarios differed as they do.

    Taking a part c of their mean out of all contrasts scales the influence of every scenario by 1 - c and leaves zeta_2 alone.
    NaN where either U is not positive.
    """
    u = np.where(pair.u > 0, pair.u, np.nan)
    factor = keep * np.sqrt(u[0] / u[1])
    zeta1 = combined(pair.zeta1, -0.5 / u[0], 0.5 / (factor * u[1]))
    zeta2 = combined(pair.zeta2, -0.5 / u[0], 0.5 / (factor**2 * u[1]))
    return hoeffding_variance(zeta1, zeta2, pair.n)


def middle_theta(pair: KernelPair) -> Float[np.ndarray, "..."]:
    """log keep in the middle of what is compatible with a weak signal: where the test's statistic is at its median.

    A U-statistic of a weak signal is right-skewed, its median lies below its mean: more than half of all samples show too
    little, and the root counts those most. At 40 scenarios of a quarter kept the plain ratio's attenuation is .047 too
    large on average and .029 in the median, this one's .011 and -.009, with a smaller rmse; where nothing at all is left it
    is the worse one (docs/simulations). -inf where it is 0, NaN where the base is not detected.
    """
    detected = pair.u[0] > pair.se[0]
    base = np.where(detected, pair.u[0], 1.0)
    square = np.where(detected, np.maximum(pair.u[1], 0) / base, np.nan)
    # The shift hardly depends on the ratio where the base is detected: each step leaves less than a quarter of the error. The
    # root itself is the same for both orders of the models.
    for _ in range(40):
        before = square
        there = deviation(pair, -square, np.ones_like(square))
        square = np.maximum(pair.u[1] + there.below_mean, 0) / base
        if np.allclose(square, before, rtol=1e-10, atol=1e-12, equal_nan=True):
            break
    with np.errstate(divide="ignore"):
        return np.asarray(0.5 * np.log(square))


def fieller(
    pair: KernelPair, critical: Float[np.ndarray, "..."] | float
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Ends of the confidence set {keep >= 0 : U_a = keep^2 U_b is not rejected} at this critical value.

    Lower end 0: no signal left is compatible, only "at least 1 - upper attenuated" can be said. Upper end
    inf: the base is not detected. Both NaN: the set is empty (the aligned U is negative beyond chance).
    Identical kernels give exactly (1, 1).
    """
    lower, upper = fieller_sets(pair, np.asarray(critical)[None])
    return lower[0], upper[0]


def fieller_sets(
    pair: KernelPair, criticals: Float[np.ndarray, "set ..."]
) -> tuple[Float[np.ndarray, "set ..."], Float[np.ndarray, "set ..."]]:
    """The same at several critical values, in one search."""
    found = members(pair, [_ratios(pair)] * len(criticals), criticals)
    lower, upper = zip(*(_keep_ends(pair, *ends) for ends in found), strict=True)
    return np.stack(lower), np.stack(upper)


def keep_interval(
    pair: KernelPair, critical: Float[np.ndarray, " cell"] | float, second_order: float = 1.0
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
    """Ends of log keep at this critical value, for a batch with one axis: theta's own where both signals are strong,
    Fieller's set elsewhere (-inf, inf and NaN as the logarithms of its 0, inf and NaN).

    A strong signal has no use for the set. Its variance at a supposed ratio contains (supposed - found) times
    the base's own error; where both models move as one, that is most of what there is, and the set lies to one
    side: where everything is scaled and the rms is all that errs, it missed the truth on
    one side only, and the logarithm's interval on both alike (docs/simulations). `second_order` weights that term of a strong signal's
    variance; bands, which live about 2.9 standard errors out, take `SECOND_ORDER`.
    """
    low, high = _log_interval(pair, critical, second_order)
    weak = ~is_strong(pair).all(axis=0) & ~pair.identical
    if weak.any():
        ends = fieller(pair.at(weak), np.broadcast_to(critical, weak.shape)[weak])
        with np.errstate(divide="ignore"):
            low[weak], high[weak] = (np.log(end) for end in ends)
    return low, high


def _log_interval(
    pair: KernelPair, critical: Float[np.ndarray, " cell"] | float, second_order: float
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
    """All theta_0 = theta - d with d^2 <= critical^2 V(d), in closed form.

    Where the difference of two models is of the second order, it is large in the samples in which its variance seems large:
    as in `deviation`, zeta_1 at the supposed value is the estimate less beta d, here for the second order's share of
    the variance only, because where the first order rules beta is not its eigenvalue. With the variance of the estimate,
    intervals of a planted twin held the truth in .984-.990 where a quarter was lost, and bands of twelve layers in as
    little as .89 (docs/simulations). The share is that at the supposed value too: with first and second for the two parts of
    V(0) and c = 4 beta d / n, V = first - c second / V + second, and at an end, where V = (d / critical)^2, this is
    d^3 - (first + second) critical^2 d + 4 beta second critical^4 / n = 0.
    """
    n, u = pair.n, np.where(pair.u > 0, pair.u, 1.0)
    on = (-0.5 / u[0], 0.5 / u[1])
    zeta1, zeta2 = (np.maximum(combined(z, *on), 0) for z in (pair.zeta1, pair.zeta2))
    beta = np.divide(cubic(pair.triangles, *on), zeta2, out=np.zeros_like(zeta2), where=zeta2 > 0)
    second = second_order * 2 * zeta2 / (n * (n - 1))
    third = (4 * zeta1 / n + second) / 3
    ratio = np.divide(beta * second, third * np.sqrt(third), out=np.zeros_like(third), where=third > 0)

    def end(cosine: np.ndarray) -> np.ndarray:
        """The largest root, by Vieta; where there is none on this side, zeta_1 is 0 before V is small enough."""
        inner = np.cos(np.arccos(np.clip(cosine, -1, 1)) / 3)
        outer = np.cosh(np.arccosh(np.maximum(cosine, 1)) / 3)
        root = 2 * np.sqrt(third) * np.where(cosine > 1, outer, inner)
        return np.asarray(critical * np.maximum(root, np.sqrt(second)))

    theta, cosine = log_ratio(pair).theta, 2 * critical / n * ratio
    return theta - end(-cosine), theta + end(cosine)


def _ratios(pair: KernelPair) -> Line:
    """U_aligned = lambda U_base for all ratios lambda = scale x / (1 - x) up to infinity, where only the base is left."""
    base, aligned = pair.u
    scale = _ratio_scale(pair)
    with np.errstate(divide="ignore", invalid="ignore"):
        point = np.where((base > 0) & (aligned >= 0), aligned / (aligned + base * scale), np.nan)
    one, zero = np.ones_like(scale), np.zeros_like(scale)
    return Line(np.stack([zero, -scale]), np.stack([one, -one]), zero, point)


def _ratio_scale(pair: KernelPair) -> np.ndarray:
    base, aligned = pair.u
    size = np.maximum(abs(aligned), pair.se[1])
    return np.divide(size, abs(base), out=np.ones_like(size), where=(base != 0) & (size > 0))


def _keep_ends(pair: KernelPair, lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(divide="ignore"):
        lower, upper = (np.sqrt(_ratio_scale(pair) * x / (1 - x)) for x in (lower, upper))
    return np.where(pair.identical, 1.0, lower), np.where(pair.identical, 1.0, upper)
