"""U-statistics of Gram matrices over scenarios, of one model and of two on the same scenarios.

Method. K = D D^T holds the inner products of the scenarios' contrast vectors; U, the mean of K over distinct
scenarios, is unbiased for |E D|^2, and sqrt(U) is the strength. Its variance is Hoeffding's (zeta_1 from one unit,
zeta_2 from a pair). Two models on the same scenarios are compared by combinations of their kernels (`keeps`, `strengths`).
The model axis is always (base, aligned).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from empathy_probes.errors import InputError
from empathy_probes.stats import hoeffding_components

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


def hoeffding_variance(
    zeta1: np.ndarray, zeta2: np.ndarray, n: int, second_order: float = SECOND_ORDER
) -> np.ndarray:
    return np.asarray(4 * np.maximum(zeta1, 0) / n + second_order * 2 * np.maximum(zeta2, 0) / (n * (n - 1)))


def u_statistic(kernel: Float[np.ndarray, "... n n"]) -> UStatistic:
    """Mean of a symmetric kernel over pairs of distinct units, its influence values and (unbiased) variance.

    The diagonal is ignored. Raises InputError unless the last two axes are equal and at least 5 long.
    """
    value, influence, zeta1, zeta2 = _hoeffding(_without_diagonal(kernel[None]))
    variance = hoeffding_variance(zeta1[0, 0, ...], zeta2[0, 0, ...], kernel.shape[-1], second_order=1.0)
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
        return np.sqrt(hoeffding_variance(self.zeta1[[0, 1], [0, 1]], self.zeta2[[0, 1], [0, 1]], self.n))

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
    zeta1, zeta2 = (combined(z, on_base, on_aligned) for z in (pair.zeta1, pair.zeta2))
    return hoeffding_variance(zeta1, zeta2, pair.n)


def combined(zeta: np.ndarray, on_base: np.ndarray | float, on_aligned: np.ndarray | float) -> np.ndarray:
    """A covariance component of the combination."""
    cross = 2 * on_base * on_aligned * zeta[0, 1]
    return np.asarray(on_base**2 * zeta[0, 0] + cross + on_aligned**2 * zeta[1, 1])


def is_strong(pair: KernelPair) -> Bool[np.ndarray, "model=2 *batch"]:
    """Which U-statistics lie far enough above 0 for a normal interval of their logarithm or root."""
    return (pair.u > 0) & (pair.u >= STRONG * pair.se)
