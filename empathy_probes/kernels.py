"""U-statistics of Gram matrices over scenarios: strengths, their ratios and differences between two models.

Method. K = D D^T holds the inner products of the scenarios' contrast vectors; U, the mean of K over distinct
scenarios, is unbiased for |E D|^2, and sqrt(U) is the strength. Its variance is Hoeffding's (zeta_1 from one unit,
zeta_2 from a pair). Two models on the same scenarios are compared by theta = log(U_a / U_b) / 2 with the kernel
(K_a / U_a - K_b / U_b) / 2. Where a signal is weak, U and the estimate of its variance rise and fall together; there
the interval holds every value that a test does not reject (for the keep: the test of U_a = lambda U_b, Fieller's), with
the variance taken at the supposed value and with the skewness that a U-statistic of a weak signal has.
The model axis is always (base, aligned).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from empathy_probes.errors import InputError
from empathy_probes.stats import (
    LEVEL,
    Curve,
    critical_t,
    hoeffding_components,
    hull_of_members,
    skewed_critical,
)

# A U-statistic below this many standard errors is too skewed for a normal interval of its logarithm.
STRONG = 4.0
# Weight of Hoeffding's second-order term in the standard errors that comparisons of two models are made of, such as that with
# the controls. 1 is unbiased, but the estimate falls together with the signal, and these errors take no account of that:
# with 1, bands of twelve layers held the truth in as little as .89 (docs/simulations).
SECOND_ORDER = 1.5
# Numbers of a model's kernels that are reduced at once. With more, temporaries leave the processor's cache and take twice the time.
BLOCK = 50_000
# With more units per dimension than this, sums over d_model x d_model are cheaper than kernels.
THIN = 2


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


def _without_diagonal(
    kernels: Float[np.ndarray, "kernel *batch n n"], *, copy: bool = True
) -> Float[np.ndarray, "kernel *batch n n"]:
    """The same with 0 on the diagonal: only pairs of different units count."""
    n = _check_kernel(kernels)
    off = kernels.astype(float, copy=copy)
    off[..., range(n), range(n)] = 0
    return off


def _hoeffding(
    off: Float[np.ndarray, "kernel *batch n n"],
) -> tuple[
    Float[np.ndarray, "kernel *batch"],
    Float[np.ndarray, "kernel *batch n"],
    Float[np.ndarray, "kernel kernel *batch"],
    Float[np.ndarray, "kernel kernel *batch"],
]:
    """Values, influences and the covariance components zeta_1, zeta_2 of every pair of kernels with an empty diagonal.

    Both components are bilinear in the kernels, so the variance of any combination x K_a + y K_b follows from
    them without touching the n x n matrices again. zeta_1 is left unclipped for that reason.
    """
    many = len(off)
    products = np.empty((many, many, *off.shape[1:-2]))
    for i in range(many):
        for j in range(i + 1):
            products[i, j] = products[j, i] = np.einsum("...st,...st->...", off[i], off[j])
    return hoeffding_components(off.sum(-1), products)


def _variance(zeta1: np.ndarray, zeta2: np.ndarray, n: int, second_order: float = SECOND_ORDER) -> np.ndarray:
    return np.asarray(4 * np.maximum(zeta1, 0) / n + second_order * 2 * np.maximum(zeta2, 0) / (n * (n - 1)))


def u_statistic(kernel: Float[np.ndarray, "... n n"]) -> UStatistic:
    """Mean of a symmetric kernel over pairs of distinct units, its influence values and (unbiased) variance.

    The diagonal is ignored. Raises InputError unless the last two axes are equal and at least 5 long.
    """
    value, influence, zeta1, zeta2 = _hoeffding(_without_diagonal(kernel[None]))
    variance = _variance(zeta1[0, 0, ...], zeta2[0, 0, ...], kernel.shape[-1], second_order=1.0)
    return UStatistic(value[0, ...], influence[0], variance)


def mean_squares(
    kernels: Float[np.ndarray, "kernel *batch n n"],
) -> Float[np.ndarray, "kernel kernel *batch"]:
    """Products of the means that symmetric kernels have over all units there are: those of their U, less the covariance of these.

    Unbiased, and so negative at times.
    """
    n = kernels.shape[-1]
    value, _, zeta1, zeta2 = _hoeffding(_without_diagonal(kernels))
    return np.einsum("i...,j...->ij...", value, value) - 4 * zeta1 / n - 2 * zeta2 / (n * (n - 1))


def mean_product(
    one: Float[np.ndarray, "*batch unit d"], other: Float[np.ndarray, "*batch unit d"]
) -> Float[np.ndarray, "*batch"]:
    """Mean of <one_s, other_t> over pairs of different units: the U-statistic of their kernel, without the kernel."""
    n = one.shape[-2]
    total = (one.sum(-2) * other.sum(-2)).sum(-1) - (one * other).sum((-2, -1))
    return np.asarray(total / (n * (n - 1)))


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
    scaled, excess = _in_rms(differences, norms, shares)
    # Times its transpose, which it is: BLAS then computes one half only.
    return _with_rms_error(scaled @ np.swapaxes(scaled, -1, -2), 2 * excess)


def cross_kernels(
    base: Float[np.ndarray, "unit layer d_model"],
    aligned: Float[np.ndarray, "unit layer d_model"],
    base_norms: Float[np.ndarray, "unit layer"],
    aligned_norms: Float[np.ndarray, "unit layer"],
    shares: Float[np.ndarray, " unit"] | None = None,
) -> Float[np.ndarray, "layer unit unit"]:
    """The same of two models, <D_base,s, D_aligned,t> in units of each one's rms; arguments as in `strength_kernels`."""
    (one, first), (other, second) = (
        _in_rms(vectors, norms, shares) for vectors, norms in ((base, base_norms), (aligned, aligned_norms))
    )
    return _with_rms_error(one @ np.swapaxes(other, -1, -2), first + second)


def _in_rms(
    vectors: Float[np.ndarray, "unit layer d_model"],
    norms: Float[np.ndarray, "unit layer"],
    shares: Float[np.ndarray, " unit"] | None = None,
) -> tuple[Float[np.ndarray, "layer unit d_model"], Float[np.ndarray, "layer unit"]]:
    """Vectors in units of the rms, and half of each unit's excess in the mean square."""
    n = len(vectors)
    weight = np.full(n, 1 / n) if shares is None else shares
    q = norms.astype(float).T
    mean = (q * weight).sum(-1)
    # Scaling n x d numbers rather than n x n ones: kernels are most of what a scorecard computes.
    scaled = np.moveaxis(vectors.astype(float), 1, 0) / np.sqrt(mean)[:, None, None]
    return scaled, n * weight * (q / mean[:, None] - 1) / 2


def _with_rms_error(
    kernel: Float[np.ndarray, "layer unit unit"], excess: Float[np.ndarray, "layer unit"]
) -> Float[np.ndarray, "layer unit unit"]:
    n = kernel.shape[-1]
    u = (kernel.sum((-2, -1)) - np.trace(kernel, axis1=-2, axis2=-1)) / (n * (n - 1))
    excess = excess * u[:, None] / 2
    kernel -= excess[:, :, None]
    kernel -= excess[:, None, :]
    return kernel


@dataclass(frozen=True)
class KernelPair:
    """The two models' U-statistics on the same units, with all that ratios and differences of them need."""

    u: Float[np.ndarray, "model=2 *batch"]
    influence: Float[np.ndarray, "model=2 *batch n"]
    """2 g: U's first-order error is its mean."""
    zeta1: Float[np.ndarray, "model=2 model=2 *batch"]
    zeta2: Float[np.ndarray, "model=2 model=2 *batch"]
    triangles: Float[np.ndarray, "aligned=4 *batch"]
    """Mean of k~_st k~_tu k~_us over distinct units, with 0 to 3 of the factors from the aligned model."""
    identical: Bool[np.ndarray, "*batch"]
    """The two kernels are the same numbers, so that every comparison is exactly "no change"."""
    n: int

    @property
    def se(self) -> Float[np.ndarray, "model=2 *batch"]:
        """Standard error of each model's U."""
        return np.sqrt(_variance(self.zeta1[[0, 1], [0, 1]], self.zeta2[[0, 1], [0, 1]], self.n))

    def at(self, part: slice | np.ndarray) -> "KernelPair":
        """Some of the cells of a batch with one axis, as a slice or a mask."""
        return KernelPair(
            self.u[:, part], self.influence[:, part], self.zeta1[..., part], self.zeta2[..., part],
            self.triangles[:, part], self.identical[part], self.n,
        )  # fmt: skip


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
    n, batch = _check_kernel(base), base.shape[:-2]
    one, other = (kernels.reshape(-1, n, n) for kernels in (base, aligned))
    size = max(1, BLOCK // n**2)
    parts = [
        _reduce(one[i : i + size], other[i : i + size], same_model) for i in range(0, max(len(one), 1), size)
    ]
    u, zeta1, zeta2, triangles, identical = (
        whole.reshape(*whole.shape[:-1], *batch)
        for whole in (np.concatenate(x, -1) for x in zip(*(part[1:] for part in parts), strict=True))
    )
    influence = np.concatenate([part[0] for part in parts], 1).reshape(2, *batch, n)
    return KernelPair(u, influence, zeta1, zeta2, triangles, identical, n)


def _reduce(
    base: Float[np.ndarray, "batch n n"], aligned: Float[np.ndarray, "batch n n"], same_model: bool
) -> tuple[np.ndarray, ...]:
    """Influence, then all fields of a `KernelPair` whose last axis is the batch's."""
    off = _without_diagonal(np.stack([base, aligned]), copy=False)
    u, influence, zeta1, zeta2 = _hoeffding(off)
    # Two empty layers (a last token that all texts share) say nothing about two different models.
    identical = (base == aligned).all(axis=(-2, -1)) & (same_model | (base != 0).any(axis=(-2, -1)))
    return 2 * influence, u, zeta1, zeta2, _triangles(off), identical


def _triangles(off: Float[np.ndarray, "model=2 *batch n n"]) -> Float[np.ndarray, "aligned=4 *batch"]:
    n = off.shape[-1]
    rows = off.sum(-1) / (n - 2)
    centred = off - (rows - rows.sum(-1, keepdims=True) / (n - 1))[..., None]
    centred -= rows[..., None, :]
    centred[..., range(n), range(n)] = 0
    base, aligned = centred
    # Times their transposes, as in `strength_kernels`.
    two_base, two_aligned = (kernel @ np.swapaxes(kernel, -1, -2) for kernel in (base, aligned))
    chains = ((two_base, base), (two_base, aligned), (two_aligned, base), (two_aligned, aligned))
    return np.stack([np.einsum("...st,...st->...", x, y) for x, y in chains]) / (n * (n - 1) * (n - 2))


def pair_strengths(
    differences: Float[np.ndarray, "model=2 unit layer d_model"],
    norms: Float[np.ndarray, "model=2 unit layer"],
    *,
    same_model: bool = False,
) -> KernelPair:
    """`pair_kernels` of both models' `strength_kernels`; where units far outnumber dimensions, without the kernels.

    Raises:
        InputError: fewer than five units.
    """
    n, d_model = differences.shape[1], differences.shape[-1]
    if n <= max(THIN * d_model, 4):  # kernels of fewer than five are refused
        kernels = [strength_kernels(d, q) for d, q in zip(differences, norms, strict=True)]
        return pair_kernels(kernels[0], kernels[1], same_model=same_model)
    in_rms = [_in_rms(d, q) for d, q in zip(differences, norms, strict=True)]
    scaled, excess = (np.stack(part) for part in zip(*in_rms, strict=True))
    squares = (scaled**2).sum(-1)
    rows = (scaled @ scaled.sum(-2)[..., None])[..., 0] - squares
    # What the error of the rms adds to a kernel is a term of each of its two units, which double centring takes out again.
    added = excess * (rows.sum(-1, keepdims=True) / (n * (n - 1)))
    shift = rows.sum(-1, keepdims=True) / (2 * (n - 1) * (n - 2)) - rows / (n - 2)
    one = np.ones_like(shift)
    # The centred kernel is left right' off its diagonal.
    left, right = (np.concatenate([scaled, np.stack(ends, -1)], -1) for ends in ((one, shift), (shift, one)))
    inner = np.swapaxes(right, -1, -2)[:, None] @ left
    products = (inner[..., :d_model, :d_model] ** 2).sum((-2, -1)) - _over_units(squares, squares)
    crossed = _over_units(rows, added)
    products += 2 * (n - 2) * _over_units(added, added) - 2 * (crossed + np.swapaxes(crossed, 0, 1))
    u, influence, zeta1, zeta2 = hoeffding_components(rows - (n - 2) * added, products)
    empty = (differences == 0).all((0, 1, -1))
    identical = (differences[0] == differences[1]).all((0, -1)) & ((norms[0] == norms[1]).all(0) | empty)
    identical &= same_model | ~empty
    triangles = _thin_triangles(left, right, inner, squares + 2 * shift)
    return KernelPair(u, 2 * influence, zeta1, zeta2, triangles, identical, n)


def _over_units(
    one: Float[np.ndarray, "model=2 *batch n"], other: Float[np.ndarray, "model=2 *batch n"]
) -> Float[np.ndarray, "model=2 model=2 *batch"]:
    return np.einsum("i...s,j...s->ij...", one, other)


def _thin_triangles(
    left: Float[np.ndarray, "model=2 *batch n rank"],
    right: Float[np.ndarray, "model=2 *batch n rank"],
    inner: Float[np.ndarray, "model=2 model=2 *batch rank rank"],
    on_diagonal: Float[np.ndarray, "model=2 *batch n"],
) -> Float[np.ndarray, "aligned=4 *batch"]:
    """`_triangles` of kernels left right' without their diagonals: all closed walks of three steps, less those that stand still."""
    n = left.shape[-2]

    def there_and_back(i: int, j: int) -> np.ndarray:
        return np.asarray(((left[i] @ inner[i, j]) * right[j]).sum(-1))

    twice = {(0, 0): there_and_back(0, 0), (0, 1): there_and_back(0, 1), (1, 1): there_and_back(1, 1)}
    twice[1, 0] = twice[0, 1]
    found = []
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):  # two factors of model i and one of model j
        whole = ((inner[j, i] @ inner[i, i]) * np.swapaxes(inner[i, j], -1, -2)).sum((-2, -1))
        here, other = on_diagonal[i], on_diagonal[j]
        still = 2 * here * twice[i, j] + other * twice[i, i] - 2 * here**2 * other
        found.append(whole - still.sum(-1))
    return np.stack(found) / (n * (n - 1) * (n - 2))


def combined_variance(
    pair: KernelPair, on_base: Float[np.ndarray, "..."], on_aligned: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """V(on_base K_base + on_aligned K_aligned), for weights that broadcast against the batch.

    With the second-order term weighted as `SECOND_ORDER` says.
    """
    zeta1, zeta2 = (_combined(z, on_base, on_aligned) for z in (pair.zeta1, pair.zeta2))
    return _variance(zeta1, zeta2, pair.n)


def _combined(zeta: np.ndarray, on_base: np.ndarray | float, on_aligned: np.ndarray | float) -> np.ndarray:
    """A covariance component of the combination."""
    cross = 2 * on_base * on_aligned * zeta[0, 1]
    return np.asarray(on_base**2 * zeta[0, 0] + cross + on_aligned**2 * zeta[1, 1])


def _cubic(of: np.ndarray, on_base: np.ndarray | float, on_aligned: np.ndarray | float) -> np.ndarray:
    """A trilinear mean of the combination, from its values with 0 to 3 factors of the aligned model."""
    none, one, two, three = of
    of_base = on_base**2 * (on_base * none + 3 * on_aligned * one)
    return np.asarray(of_base + on_aligned**2 * (3 * on_base * two + on_aligned * three))


@dataclass(frozen=True)
class Deviation:
    """How far a combination of the two U-statistics lies from its supposed value."""

    value: Float[np.ndarray, "..."]
    variance: Float[np.ndarray, "..."]
    """If the supposed value is true."""
    skewness: Float[np.ndarray, "..."]
    """Likewise, as of Gaussian scenarios."""

    @property
    def below_mean(self) -> Float[np.ndarray, "..."]:
        """How far the median of the combination lies below its mean (Cornish and Fisher's first term)."""
        return self.skewness * np.sqrt(self.variance) / 6

    def beyond(self, critical: Float[np.ndarray, "..."] | float, n: int) -> Float[np.ndarray, "..."]:
        """Standard errors divided by their critical value: within -1 and 1 unless the supposed value is rejected.

        The longer tail gets the critical value of its own shape, at the whole error probability, because the shorter tail
        then holds next to nothing; it is never taken shorter than Student's.
        """
        longer = skewed_critical(critical, abs(self.skewness), n - 1)
        limit = np.where((self.value > 0) == (self.skewness > 0), longer, critical)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.value == 0, 0.0, self.value / np.sqrt(self.variance) / limit)


def deviation(
    pair: KernelPair,
    on_base: Float[np.ndarray, "..."] | float,
    on_aligned: Float[np.ndarray, "..."] | float,
    supposed: Float[np.ndarray, "..."] | float = 0.0,
) -> Deviation:
    """Hold on_base U_base + on_aligned U_aligned against a supposed value.

    The estimate of zeta_1 errs with U: where chance makes a signal large, it makes its variance large too. With mu_i
    the eigenvalues of the kernel, errors of U of the second order go with those of zeta_1 as sum mu_i z_i^2 goes with
    sum mu_i^2 z_i^2, so that zeta_1 at the supposed value is the estimate less beta (U - supposed), beta = sum mu^3 / sum mu^2.
    Errors of the first order move zeta_1 by the eigenvalues that the signal meets, which may be smaller: the
    first order's share of the variance counts half. Without all that the interval of a vanished signal covers 1.000 for
    .95 and one of a signal just above its noise .90 (docs/simulations). The third cumulant is
    24 sum mu_i^3 b_i^2 / n^2 + 8 sum mu^3 / n^3 with zeta_1 = sum mu_i^2 b_i^2; its first sum is taken as beta zeta_1.
    """
    n = pair.n
    value = np.asarray(on_base * pair.u[0] + on_aligned * pair.u[1] - supposed)
    zeta1, zeta2 = (_combined(z, on_base, on_aligned) for z in (pair.zeta1, pair.zeta2))
    zeta2 = np.maximum(zeta2, 0)
    triangles = _cubic(pair.triangles, on_base, on_aligned)
    beta = np.divide(triangles, zeta2, out=np.zeros_like(zeta2), where=zeta2 > 0)
    second = 2 * zeta2 / (n * (n - 1))
    first = 4 * np.maximum(zeta1 - beta * value, 0) / n
    whole = first + second
    beta = beta * (1 - 0.5 * np.divide(first, whole, out=np.zeros_like(whole), where=whole > 0))
    first = 4 * np.maximum(zeta1 - beta * value, 0) / n
    variance = first + second
    third = beta / n * (6 * first + 4 * second)
    # Multiplied out: a power that is no square takes numpy as long as all the rest.
    size = variance * np.sqrt(variance)
    skewness = np.divide(third, size, out=np.zeros_like(third), where=variance > 0)
    return Deviation(value, variance, skewness)


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
    zeta1 = _combined(pair.zeta1, -0.5 / u[0], 0.5 / (factor * u[1]))
    zeta2 = _combined(pair.zeta2, -0.5 / u[0], 0.5 / (factor**2 * u[1]))
    return _variance(zeta1, zeta2, pair.n)


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
    found = _members(pair, [_ratios(pair)] * len(criticals), criticals)
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
    zeta1, zeta2 = (np.maximum(_combined(z, *on), 0) for z in (pair.zeta1, pair.zeta2))
    beta = np.divide(_cubic(pair.triangles, *on), zeta2, out=np.zeros_like(zeta2), where=zeta2 > 0)
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


@dataclass(frozen=True)
class _Line:
    """A hypothesis for every x from 0 to 1: (on_base + x on_base') U_base + (the same) U_aligned = x supposed'."""

    on_base: Float[np.ndarray, "constant_slope=2 *batch"]
    on_aligned: Float[np.ndarray, "constant_slope=2 *batch"]
    supposed: Float[np.ndarray, "*batch"]
    point: Float[np.ndarray, "*batch"]
    """Where the estimate lies; NaN where it is no possible value."""


def _members(
    pair: KernelPair, lines: Sequence[_Line], critical: Float[np.ndarray, "..."] | float
) -> list[tuple[Float[np.ndarray, "*batch"], Float[np.ndarray, "*batch"]]]:
    """Smallest and largest x of each line that is not rejected; NaN where all are."""
    on_base, on_aligned = (
        np.stack([getattr(x, name) for x in lines], 1) for name in ("on_base", "on_aligned")
    )
    supposed = np.stack([line.supposed for line in lines])

    def rejected(x: np.ndarray) -> np.ndarray:
        there = deviation(pair, on_base[0] + on_base[1] * x, on_aligned[0] + on_aligned[1] * x, supposed * x)
        return abs(there.beyond(critical, pair.n)) - 1

    return list(zip(*hull_of_members(rejected, np.stack([line.point for line in lines])), strict=True))


def _ratios(pair: KernelPair) -> _Line:
    """U_aligned = lambda U_base for all ratios lambda = scale x / (1 - x) up to infinity, where only the base is left."""
    base, aligned = pair.u
    scale = _ratio_scale(pair)
    with np.errstate(divide="ignore", invalid="ignore"):
        point = np.where((base > 0) & (aligned >= 0), aligned / (aligned + base * scale), np.nan)
    one, zero = np.ones_like(scale), np.zeros_like(scale)
    return _Line(np.stack([zero, -scale]), np.stack([one, -one]), zero, point)


def _ratio_scale(pair: KernelPair) -> np.ndarray:
    base, aligned = pair.u
    size = np.maximum(abs(aligned), pair.se[1])
    return np.divide(size, abs(base), out=np.ones_like(size), where=(base != 0) & (size > 0))


def _keep_ends(pair: KernelPair, lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(divide="ignore"):
        lower, upper = (np.sqrt(_ratio_scale(pair) * x / (1 - x)) for x in (lower, upper))
    return np.where(pair.identical, 1.0, lower), np.where(pair.identical, 1.0, upper)


def _squares(pair: KernelPair, model: int, critical: Float[np.ndarray, "..."] | float) -> _Line:
    """U = u of one model for all u from 0 to beyond what can be accepted."""
    n, u, zeta2 = pair.n, pair.u[model], pair.zeta2[model, model]
    here = deviation(pair, 1.0 - model, float(model), u)
    slope = 4 / n * np.divide(abs(pair.triangles[3 * model]), zeta2, out=np.zeros_like(u), where=zeta2 > 0)
    # The variance grows with u by no more than this slope.
    longest = skewed_critical(critical, np.array(np.inf), n - 1)
    most = np.maximum(u, 0) + 1.01 * (longest**2 * slope + longest * np.sqrt(here.variance))
    point = np.divide(u, most, out=np.full_like(u, np.nan), where=(most > 0) & (u >= 0))
    on = [np.stack([np.full_like(u, x), np.zeros_like(u)]) for x in (1.0 - model, float(model))]
    return _Line(on[0], on[1], most, point)


# ---------------------------------------------------------------- strengths


def is_strong(pair: KernelPair) -> Bool[np.ndarray, "model=2 *batch"]:
    """Which U-statistics lie far enough above 0 for a normal interval of their logarithm or root."""
    return (pair.u > 0) & (pair.u >= STRONG * pair.se)


def strength_interval(pair: KernelPair) -> tuple[Curve, Curve]:
    """Strength sqrt(max(U, 0)) of (base, aligned) with its 95 % interval.

    Where a signal is strong, U +- t se under the root; elsewhere all values of U, from 0 on, that are not rejected, around the
    one at which the test's statistic is at its median (see `middle_theta`).
    """
    t = float(critical_t(pair.n - 1))
    strong = is_strong(pair)
    lines = [_squares(pair, model, t) for model in (0, 1)]
    curves = []
    for model, found in enumerate(_members(pair, lines, t)):
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
    least, most = (np.sqrt(np.fmax(x, 0) * line.supposed) for x in _members(pair, (line,), t)[0])
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
