"""How well scores tell labels: AUROC (Mann and Whitney), a smooth one, and Pearson's correlation for grades.

Ties count one half. Everything is float64.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats as distributions

from empathy_probes.errors import InputError


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
        ramp = ramp_width(x, positive, kept)
        one, zero = ((x[..., side], kept[..., side]) for side in (positive, ~positive))
        wins = _summed_excess(one, zero, ramp) - _summed_excess(one, zero, -ramp)
        found.append(wins / (2 * ramp[..., 0] * one[1].sum(-1) * zero[1].sum(-1)))
    return np.asarray(np.mean(found, axis=0))


def ramp_width(
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


def auroc_placements(
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
