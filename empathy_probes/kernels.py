"""U-statistics of Gram matrices over scenarios: strengths, their ratios and differences between two models.

Method. K = D D^T holds the inner products of the scenarios' contrast vectors; U, the mean of K over distinct
scenarios, is unbiased for |E D|^2, and sqrt(U) is the strength. Its variance is Hoeffding's (zeta_1 from one unit,
zeta_2 from a pair). Two models on the same scenarios are compared by theta = log(U_a / U_b) / 2 with the kernel
(K_a / U_a - K_b / U_b) / 2, or, where a signal is weak, by inverting the test of U_a = lambda U_b (Fieller).
The model axis is always (base, aligned).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats as distributions

from empathy_probes.errors import InputError
from empathy_probes.stats import LEVEL, Curve, critical_t, invert_quadratics

# A U-statistic below this many standard errors is too skewed for a normal interval of its logarithm.
STRONG = 4.0
# Weight of Hoeffding's second-order term where two models are compared. 1 is unbiased, but the estimate falls
# together with the signal: where much was lost, intervals with it cover as little as .909, and at 2.9 standard
# errors, where simultaneous bands live, .975 for a nominal .995. With 1.5 these are .936 and .986
# (docs/simulations). The price is width where nothing was lost: 1-6 %, up to 18 % with little data in much noise.
SECOND_ORDER = 1.5


@dataclass(frozen=True)
class UStatistic:
    """Mean of a symmetric kernel over distinct units."""

    value: Float[np.ndarray, "..."]
    influence: Float[np.ndarray, "... n"]
    """g: what each unit adds; sums to 0; the first-order error of `value` is the mean of 2 g."""
    variance: Float[np.ndarray, "..."]


def _check_kernel(kernel: Float[np.ndarray, "... n n"]) -> int:
    if kernel.ndim < 2 or kernel.shape[-1] != kernel.shape[-2] or kernel.shape[-1] < 5:
        raise InputError(
            f"a kernel has shape {kernel.shape}, expected [... n n] with n of 5 or more: pass one Gram matrix "
            "over scenarios per layer"
        )
    return int(kernel.shape[-1])


def _hoeffding(
    kernels: Float[np.ndarray, "kernel *batch n n"],
) -> tuple[
    Float[np.ndarray, "kernel *batch"],
    Float[np.ndarray, "kernel *batch n"],
    Float[np.ndarray, "kernel kernel *batch"],
    Float[np.ndarray, "kernel kernel *batch"],
]:
    """Values, influences and the covariance components zeta_1, zeta_2 of every pair of kernels.

    Both components are bilinear in the kernels, so the variance of any combination x K_a + y K_b follows from
    them without touching the n x n matrices again. zeta_1 is left unclipped for that reason.
    """
    n = _check_kernel(kernels)
    off = np.where(np.eye(n, dtype=bool), 0.0, kernels.astype(float, copy=False))
    rows = off.sum(-1)
    total = rows.sum(-1)
    value = total / (n * (n - 1))
    influence = (rows / (n - 1) - value[..., None]) * (n - 1) / (n - 2)
    # The doubly centred kernel has zero row sums, hence sum(k~ l~) = sum(k l) - 2 sum(r q)/(n-2) + S R/((n-1)(n-2)).
    products = np.einsum("i...st,j...st->ij...", off, off)
    products -= 2 * np.einsum("i...s,j...s->ij...", rows, rows) / (n - 2)
    products += np.einsum("i...,j...->ij...", total, total) / ((n - 1) * (n - 2))
    zeta2 = products / (n * (n - 3))
    spread = np.einsum("i...s,j...s->ij...", influence, influence) / (n - 1)
    return value, influence, spread - zeta2 * (n - 1) / (n - 2) ** 2, zeta2


def _variance(zeta1: np.ndarray, zeta2: np.ndarray, n: int, second_order: float = SECOND_ORDER) -> np.ndarray:
    return np.asarray(4 * np.maximum(zeta1, 0) / n + second_order * 2 * np.maximum(zeta2, 0) / (n * (n - 1)))


def u_statistic(kernel: Float[np.ndarray, "... n n"]) -> UStatistic:
    """Mean of a symmetric kernel over pairs of distinct units, its influence values and (unbiased) variance.

    The diagonal is ignored. Raises InputError unless the last two axes are equal and at least 5 long.
    """
    value, influence, zeta1, zeta2 = _hoeffding(np.asarray(kernel, dtype=float)[None])
    variance = _variance(zeta1[0, 0, ...], zeta2[0, 0, ...], kernel.shape[-1], second_order=1.0)
    return UStatistic(value[0, ...], influence[0], variance)


def strength_kernels(
    differences: Float[np.ndarray, "unit layer d_model"],
    norms: Float[np.ndarray, "unit layer"],
    shares: Float[np.ndarray, " unit"] | None = None,
) -> Float[np.ndarray, "layer unit unit"]:
    """D D^T in units of the rms, with the sampling error of the rms itself in the kernel.

    The rms is estimated from the same scenarios as the contrast. Where two models differ by little, its error is most of
    what there is: without it, bands of concepts that a twin leaves alone held the truth in .78-.90 of redraws. U / R
    with R = mean q has the first-order error 2 g - U (q_s / R - 1), which is that of the kernel
    K_st - U (q_s / R - 1 + q_t / R - 1) / 2; its U is the same. Whatever is computed from the kernel accounts for it.

    Args:
        differences: label 1 minus label 0 of each unit.
        norms: mean squared norm of each unit's texts.
        shares: of all texts that are the unit's; equal ones by default.
    """
    return cross_kernels(differences, differences, norms, norms, shares)


def cross_kernels(
    base: Float[np.ndarray, "unit layer d_model"],
    aligned: Float[np.ndarray, "unit layer d_model"],
    base_norms: Float[np.ndarray, "unit layer"],
    aligned_norms: Float[np.ndarray, "unit layer"],
    shares: Float[np.ndarray, " unit"] | None = None,
) -> Float[np.ndarray, "layer unit unit"]:
    """The same of two models, <D_base,s, D_aligned,t> in units of each one's rms; arguments as in `strength_kernels`."""
    n = len(base)
    weight = np.full(n, 1 / n) if shares is None else shares
    kernel = np.moveaxis(base.astype(float), 1, 0) @ np.moveaxis(aligned.astype(float), 0, -1)
    excess = np.zeros((kernel.shape[0], n))
    for norms in (base_norms, aligned_norms):
        q = norms.astype(float).T
        mean = (q * weight).sum(-1)
        kernel = kernel / np.sqrt(mean)[:, None, None]
        excess += n * weight * (q / mean[:, None] - 1) / 2
    u = (kernel.sum((-2, -1)) - np.trace(kernel, axis1=-2, axis2=-1)) / (n * (n - 1))
    return np.asarray(kernel - u[:, None, None] * (excess[:, :, None] + excess[:, None, :]) / 2)


@dataclass(frozen=True)
class KernelPair:
    """The two models' U-statistics on the same units, with all that ratios and differences of them need."""

    u: Float[np.ndarray, "model=2 *batch"]
    influence: Float[np.ndarray, "model=2 *batch n"]
    """2 g: U's first-order error is its mean."""
    zeta1: Float[np.ndarray, "model=2 model=2 *batch"]
    zeta2: Float[np.ndarray, "model=2 model=2 *batch"]
    identical: Bool[np.ndarray, "*batch"]
    """The two kernels are the same numbers, so that every comparison is exactly "no change"."""
    n: int

    @property
    def se(self) -> Float[np.ndarray, "model=2 *batch"]:
        """Standard error of each model's U."""
        return np.sqrt(_variance(self.zeta1[[0, 1], [0, 1]], self.zeta2[[0, 1], [0, 1]], self.n))


def pair_kernels(
    base: Float[np.ndarray, "... n n"], aligned: Float[np.ndarray, "... m m"], *, same_model: bool = False
) -> KernelPair:
    """Reduce two stacks of Gram matrices over the same scenarios to what their comparison needs.

    `same_model` says that both come from equal weights: then even layers without any contrast are identical.

    Raises:
        InputError: the two are not over equally many scenarios (m is n), or not of equal shape.
    """
    if base.shape != aligned.shape:
        raise InputError(
            f"the kernels have shapes {base.shape} and {aligned.shape}, expected equal ones: "
            "compute both models on the same scenarios and layers"
        )
    u, influence, zeta1, zeta2 = _hoeffding(np.stack([base, aligned]))
    # Two empty layers (a last token that all texts share) say nothing about two different models.
    identical = (base == aligned).all(axis=(-2, -1)) & (same_model | (base != 0).any(axis=(-2, -1)))
    return KernelPair(u, 2 * influence, zeta1, zeta2, identical, int(base.shape[-1]))


def combined_variance(
    pair: KernelPair, on_base: Float[np.ndarray, "..."], on_aligned: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """V(on_base K_base + on_aligned K_aligned), for weights that broadcast against the batch.

    With the second-order term weighted as `SECOND_ORDER` says.
    """
    pieces = [
        on_base**2 * z[0, 0] + 2 * on_base * on_aligned * z[0, 1] + on_aligned**2 * z[1, 1]
        for z in (pair.zeta1, pair.zeta2)
    ]
    return _variance(pieces[0], pieces[1], pair.n)


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


def fieller(
    pair: KernelPair, critical: Float[np.ndarray, "..."] | float
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Ends of the confidence set {keep >= 0 : |U_a - keep^2 U_b| <= critical sqrt V(K_a - keep^2 K_b)}.

    Lower end 0: no signal left is compatible, only "at least 1 - upper attenuated" can be said. Upper end
    inf: the base is not detected. Both NaN: the set is empty (the aligned U is negative beyond chance).
    Identical kernels give exactly (1, 1).
    """
    n, c2 = pair.n, np.asarray(critical, dtype=float) ** 2
    base, aligned = pair.u
    pieces = []
    for z, scale in ((pair.zeta2, SECOND_ORDER * 2 / (n * (n - 1))), (pair.zeta1, 4 / n)):
        pieces.append((c2 * scale * z[1, 1], -2 * c2 * scale * z[0, 1], c2 * scale * z[0, 0]))
    lower, upper = invert_quadratics((aligned**2, -2 * aligned * base, base**2), pieces[0], pieces[1], 0.0)
    # The estimate itself always belongs to the set; with next to no variance the roots round past it.
    with np.errstate(divide="ignore", invalid="ignore"):
        point = np.where((base > 0) & (aligned >= 0), aligned / base, np.nan)
    lower, upper = np.sqrt(np.fmin(lower, point)), np.sqrt(np.fmax(upper, point))
    return np.where(pair.identical, 1.0, lower), np.where(pair.identical, 1.0, upper)


# ---------------------------------------------------------------- strengths


def is_strong(pair: KernelPair) -> Bool[np.ndarray, "model=2 *batch"]:
    """Which U-statistics lie far enough above 0 for a normal interval of their logarithm or root."""
    return (pair.u > 0) & (pair.u >= STRONG * pair.se)


def strength_interval(pair: KernelPair) -> tuple[Curve, Curve]:
    """Strength sqrt(max(U, 0)) of (base, aligned); the 95 % interval of U, cut at 0, under the root."""
    reach = critical_t(pair.n - 1) * pair.se
    ends = [np.sqrt(np.maximum(x, 0)) for x in (pair.u, pair.u - reach, pair.u + reach)]
    return Curve(*(x[0] for x in ends)), Curve(*(x[1] for x in ends))


def strength_difference(pair: KernelPair) -> Curve:
    """Strength(aligned) - strength(base) with a 95 % interval.

    Delta method where both are strong. Elsewhere the root is too curved, and at 0 cut off: the interval is the
    range of the difference over the 95 % region of the two U-statistics (combining the two single intervals
    covered .80 where the aligned signal is gone).
    """
    base, aligned = strength_interval(pair)
    value = aligned.value - base.value
    lower, upper = _projected_difference(pair)
    strong = is_strong(pair).all(axis=0)
    safe = np.where(strong, np.sqrt(np.maximum(pair.u, 0)), 1.0)
    reach = critical_t(pair.n - 1) * np.sqrt(combined_variance(pair, -0.5 / safe[0], 0.5 / safe[1]))
    lower, upper = np.where(strong, value - reach, lower), np.where(strong, value + reach, upper)
    # Without noise the projection rounds past the value itself.
    ends = (value, np.fmin(lower, value), np.fmax(upper, value))
    return Curve(*(np.where(pair.identical, 0.0, x) for x in ends))


def _projected_difference(pair: KernelPair) -> tuple[np.ndarray, np.ndarray]:
    """Extremes of a - b over strengths a, b >= 0 whose squares lie in the ellipse of the two U-statistics."""
    n, se = pair.n, np.maximum(pair.se, 1e-150)
    # Where a strength may be 0 the truth sits on the edge of the region and two errors add up unopposed (t covered
    # .83-.90 there): the region is then the joint one of both.
    one, two = critical_t(n - 1), np.sqrt(2 * distributions.f.ppf(LEVEL, 2, n - 1))
    t = np.where((pair.u <= one * pair.se).any(axis=0), two, one)
    covariance = 4 * pair.zeta1[0, 1] / n + SECOND_ORDER * 2 * pair.zeta2[0, 1] / (n * (n - 1))
    r = np.clip(covariance / (se[0] * se[1]), -1, 1)
    least, most = (np.sqrt(np.maximum(pair.u[1] + s * t * se[1], 0)) for s in (-1, 1))
    a = least + (most - least) * np.linspace(0, 1, 129).reshape(-1, *[1] * least.ndim)
    z = np.clip((pair.u[1] - a**2) / se[1], -t, t)
    width = np.sqrt((1 - r**2) * (t**2 - z**2))
    high, low = (np.sqrt(np.maximum(pair.u[0] - se[0] * (r * z + s * width), 0)) for s in (-1, 1))
    return (a - high).min(axis=0), (a - low).max(axis=0)
