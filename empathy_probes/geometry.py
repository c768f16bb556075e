"""Is the concept in the same place in both models, and how far apart are its labels in units of what else varies?

Crossnobis d' replaces the identity of strength by the inverse Ledoit-Wolf covariance of neutral texts: K = D W D', the
same U, variance and ratio. The disattenuated cosine of two models' mean differences is U_ab / sqrt(U_a U_b), with U_ab the
mean of <D_a,s, D_b,t> over different scenarios, so that noise neither shrinks nor inflates it; near 1 its error is that of
its sine. The 2 x 2 transfer grid reads each
model's held-out texts with each model's probe, plain and after the neutral-text map: a base probe that fails on aligned
states while one fitted there succeeds means rotated, not lost.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int, Num
from sklearn.covariance import ledoit_wolf_shrinkage

from empathy_probes.alignment import NeutralMap, fit_rotation
from empathy_probes.keeps import fieller
from empathy_probes.kernels import KernelPair, mean_product, mean_squares, pair_kernels, u_statistic
from empathy_probes.probes import paired_scores
from empathy_probes.stats import Curve, critical_t

# A cosine beyond this has the interval of its sine.
NEAR = 0.8
# Groups of neutral texts that are left out in turn.
GROUPS = 10


def whitened_kernels(
    differences: Float[np.ndarray, "unit layer d_model"], neutral: Float[np.ndarray, "m layer d_model"]
) -> Float[np.ndarray, "layer unit unit"]:
    """D W D' with W the inverse Ledoit-Wolf covariance of the neutral texts, layer by layer."""
    return np.stack([sum(a @ b for a, b in factors) for factors in _whitened(differences, neutral)])


def whitened_strengths(
    differences: Float[np.ndarray, "unit layer d_model"], neutral: Float[np.ndarray, "m layer d_model"]
) -> Float[np.ndarray, " layer"]:
    """U of `whitened_kernels`, their mean over pairs of different units, without the kernels."""
    factors = _whitened(differences, neutral)
    return np.array([sum(mean_product(a, b.T) for a, b in layer) for layer in factors])


def _whitened(
    differences: Float[np.ndarray, "unit layer d_model"], neutral: Float[np.ndarray, "m layer d_model"]
) -> Iterator[list[tuple[Float[np.ndarray, "unit k"], Float[np.ndarray, "k unit"]]]]:
    """Matrices whose products add up to D W D', layer by layer."""
    for i in range(differences.shape[1]):
        d, x = differences[:, i].astype(float), neutral[:, i].astype(float)
        x = x - x.mean(0)
        m, width = x.shape
        size = (x**2).sum() / (m * width)
        if size == 0:  # a state that all texts share: nothing varies, nothing is told apart
            yield [(d, np.zeros_like(d.T))]
            continue
        share = max(float(ledoit_wolf_shrinkage(x, assume_centered=True)), 1e-6)
        ridge, weight = share * size, (1 - share) / m
        if m >= width:
            covariance = weight * x.T @ x + ridge * np.eye(width)
            yield [(d, np.linalg.solve(covariance, d.T))]
        else:  # Woodbury: only an m x m matrix is inverted
            cross = d @ x.T
            inner = x @ x.T + ridge / weight * np.eye(m)
            yield [(d, d.T / ridge), (-cross, np.linalg.solve(inner, cross.T) / ridge)]


def whitening_covariance(
    differences: tuple[
        Float[np.ndarray, "contrast unit layer d_model"], Float[np.ndarray, "contrast unit layer d_model"]
    ],
    neutral: tuple[Float[np.ndarray, "m layer d_model"], Float[np.ndarray, "m layer d_model"]],
) -> Float[np.ndarray, "model=2 model=2 layer"]:
    """Covariance of the whitened U of (base, aligned) that comes from the choice of neutral texts alone.

    Delete-a-group jackknife; a group is left out of both models at once, because the texts are the same. Without it,
    intervals of the attenuation of d' cover .54-.96 in simulations with 80 and 320 texts, with it .91-.97 (docs/simulations).
    Unbiased and so negative at times: it is added to zeta_1, and the sum is what must not be.
    """
    group = _groups(neutral[0])
    found = []
    for i in range(differences[0].shape[2]):
        left_out = [
            [
                np.mean([whitened_kernels(c[:, [i]], x[group != g, i : i + 1])[0] for c in d], axis=0)
                for d, x in zip(differences, neutral, strict=True)
            ]
            for g in range(GROUPS)
        ]
        found.append(_jackknife(np.array(left_out)))
    return np.stack(found, -1)


def map_variance(
    differences: tuple[
        Float[np.ndarray, "contrast unit layer d_model"], Float[np.ndarray, "contrast unit layer d_model"]
    ],
    neutral: tuple[Float[np.ndarray, "m layer d_model"], Float[np.ndarray, "m layer d_model"]],
) -> Float[np.ndarray, " layer"]:
    """Variance of the mapped U_ab that comes from the choice of neutral texts alone: the map fitted anew without each group of them.

    Without it, intervals of the mapped cosine of a twin that writes a concept in another place held the truth in .88
    (320 neutral texts, 40 and 100 scenarios), with it in .96 and .97 (docs/simulations).
    """
    group = _groups(neutral[0])
    found = []
    for i in range(differences[0].shape[2]):
        (base, x), (aligned, y) = (
            _in_span(d[:, :, i], texts[:, i]) for d, texts in zip(differences, neutral, strict=True)
        )
        left_out = []
        for g in range(GROUPS):
            left, right = fit_rotation(x[group != g], y[group != g])
            crossed = np.mean(base @ left @ right.T @ np.swapaxes(aligned, -1, -2), axis=0)
            left_out.append([(crossed + crossed.T) / 2])
        found.append(_jackknife(np.array(left_out))[0, 0])
    # The cosine's interval takes it as a variance of its own.
    return np.maximum(found, 0)


def _jackknife(left_out: Float[np.ndarray, "group kernel n n"]) -> Float[np.ndarray, "kernel kernel"]:
    """Covariance of the kernels' U, each found without a group of neutral texts in turn, that scenarios have no part in.

    What other neutral texts would change differs from scenario to scenario, and the variance over scenarios contains
    that: from these U themselves it would be counted twice, which made intervals of d' up to a fifth too wide (docs/simulations).
    """
    moved = left_out - left_out.mean(0)
    return np.asarray((GROUPS - 1) / GROUPS * np.sum([mean_squares(kernels) for kernels in moved], axis=0))


def _in_span(
    differences: Float[np.ndarray, "contrast unit d_model"], neutral: Float[np.ndarray, "m d_model"]
) -> tuple[Float[np.ndarray, "contrast unit rank"], Float[np.ndarray, "m rank"]]:
    """Both within the span of the neutral texts where that is smaller: a rotation fitted on them knows nothing else."""
    if len(neutral) >= neutral.shape[1]:
        return differences, neutral
    axes = np.linalg.qr(neutral.T)[0]
    return differences @ axes, neutral @ axes


def _groups(neutral: Float[np.ndarray, "m layer d_model"]) -> Int[np.ndarray, " m"]:
    return np.arange(len(neutral)) % GROUPS


def cosine_from_kernels(
    base: Float[np.ndarray, "layer n n"],
    aligned: Float[np.ndarray, "layer n n"],
    cross: Float[np.ndarray, "layer n n"],
    extra: Float[np.ndarray, " layer"] | None = None,
) -> Curve:
    """Disattenuated cosine of the two models' contrasts with a 95 % interval; exactly 1 where the kernels are the same.

    Near 1 a cosine errs as its sine does, whose square is a ratio of two U-statistics: what is left of the one contrast
    without its component along the other, to all of it. The interval is that of Fieller's set for this ratio; with a standard
    error for the cosine it held the truth in .81 (docs/simulations). Elsewhere it is that of leaving each scenario out.
    Shown wherever one model's contrast is detected, also where it excludes nothing and is -1 to 1: of a contrast all but erased the
    intervals that did exclude something, one in three, held the truth in .81. The value is shown only where both are detected.

    Args:
        base: <D_base,s, D_base,t>.
        aligned: the same in the aligned model.
        cross: <D_base,s, D_aligned,t>.
        extra: variance of U_ab from another source than the scenarios.
    """
    n = base.shape[-1]
    more = np.zeros(len(base)) if extra is None else extra
    t = float(critical_t(n - 1))
    base, aligned, cross = (kernel.astype(float) for kernel in (base, aligned, cross))
    pair = pair_kernels(base, aligned)
    detected = pair.u > t * pair.se
    value, reach = delete_one_cosine(base, aligned, cross)
    reach = np.hypot(reach, t * np.sqrt(more / np.where((pair.u > 0).all(0), pair.u.prod(0), np.inf)))
    same = pair.identical & np.isclose(cross, base, rtol=0, atol=1e-6).all((-2, -1))
    near = detected.any(0) & ~(abs(value) <= NEAR) & ~same
    # Without one of its scenarios a contrast would not be there: such a cosine may be anything.
    reach = np.where(np.isnan(reach), 2.0, reach)
    low, high = np.clip(value - reach, -1, 1), np.clip(value + reach, -1, 1)
    if near.any():
        low[near], high[near] = _near_one(
            base[near], aligned[near], cross[near], more[near], pair.at(near), t
        )
    point = np.where(detected.all(0), np.clip(value, -1, 1), np.nan)
    return Curve(*(np.where(detected.any(0), np.where(same, 1.0, x), np.nan) for x in (point, low, high)))


def delete_one_cosine(
    base: Float[np.ndarray, "layer n n"],
    aligned: Float[np.ndarray, "layer n n"],
    cross: Float[np.ndarray, "layer n n"],
) -> tuple[Float[np.ndarray, " layer"], Float[np.ndarray, " layer"]]:
    """The cosine itself and half of its delete-one 95 % interval; kernels as in `cosine_from_kernels`."""
    n = base.shape[-1]
    (ab, ab_left), *own = (_mean_and_left_out(kernel) for kernel in (cross, base, aligned))
    value = _cosine(ab, *(u for u, _ in own))
    left_out = _cosine(ab_left, *(u for _, u in own))
    spread = left_out - left_out.mean(-1, keepdims=True)
    return value, critical_t(n - 1) * np.sqrt((n - 1) / n * (spread**2).sum(-1))


def _cosine(ab: np.ndarray, base: np.ndarray, aligned: np.ndarray) -> np.ndarray:
    """U_ab / sqrt(U_a U_b); NaN where either is not positive."""
    positive = (aligned > 0) & (base > 0)
    size = np.sqrt(np.where(positive, aligned * base, 1.0))
    return np.divide(ab, size, out=np.full_like(ab, np.nan), where=positive)


def _near_one(
    base: Float[np.ndarray, "layer n n"],
    aligned: Float[np.ndarray, "layer n n"],
    cross: Float[np.ndarray, "layer n n"],
    extra: Float[np.ndarray, " layer"],
    pair: KernelPair,
    t: float,
) -> tuple[Float[np.ndarray, " layer"], Float[np.ndarray, " layer"]]:
    """Ends of the cosine from those of its sine."""
    found = pair.u / np.maximum(pair.se, 1e-300)
    aligned_surer = (found[1] > found[0])[:, None, None]
    surer, other = np.where(aligned_surer, aligned, base), np.where(aligned_surer, base, aligned)
    both = (cross + np.swapaxes(cross, -1, -2)) / 2
    shared = u_statistic(both)
    # The component that leaves least: its own error does not matter to first order.
    part = shared.value / u_statistic(surer).value
    rest = other - 2 * part[:, None, None] * both + part[:, None, None] ** 2 * surer
    left = pair_kernels(other, rest)
    # First-order terms enter every variance as 4 zeta_1 / n; what is left moves by 2 part per unit of U_ab.
    left.zeta1[1, 1] += left.n * part**2 * extra
    least, most = fieller(left, t)
    # What is left is negative beyond chance: nothing is.
    nothing = np.isnan(least)
    least, most = (np.where(nothing, 0.0, np.minimum(end, 1.0)) for end in (least, most))
    far, close = (np.sqrt(np.maximum(1 - end**2, 0)) for end in (most, least))
    known = abs(shared.value) > t * np.sqrt(shared.variance + extra)
    positive = shared.value > 0
    return (
        np.where(known & positive, far, -close),
        np.where(known & ~positive, -far, close),
    )


def _mean_and_left_out(kernel: Float[np.ndarray, "layer n n"]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over different units, and the same with each unit left out."""
    n = kernel.shape[-1]
    off = np.where(np.eye(n, dtype=bool), 0.0, kernel)
    total = off.sum((-2, -1))
    without = total[:, None] - off.sum(-1) - off.sum(-2)
    return total / (n * (n - 1)), without / ((n - 1) * (n - 2))


def transfer(
    base: Float[np.ndarray, "n layer d_model"],
    aligned: Float[np.ndarray, "n layer d_model"],
    labels: Num[np.ndarray, "contrast n"],
    folds: Int[np.ndarray, " n"],
    mapped: NeutralMap | None = None,
) -> Float[np.ndarray, "fitted=2 layer contrast n"]:
    """Out-of-fold scores of each model's probe on the other model's held-out texts.

    Args:
        base: states in units of the rms.
        aligned: the same texts in the aligned model.
        labels: one row per contrast.
        folds: fold of each text; texts of a scenario share one.
        mapped: carries the other model's states over first; without it they are read as they are.

    Returns:
        First the base's probe on aligned states, then the aligned model's on base states.
    """
    there = aligned if mapped is None else mapped.backward(aligned)
    back = base if mapped is None else mapped.forward(base)
    return np.stack([paired_scores(base, there, labels, folds), paired_scores(aligned, back, labels, folds)])
