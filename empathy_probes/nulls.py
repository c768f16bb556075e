"""What chance gives: shuffled labels, and directions that have nothing to do with the concept.

Labels are shuffled as the design varies them: within a scenario all texts of one label get another together, and so do all
scenarios of a cluster. Each text by itself would give scenarios of several texts per label hardly any contrast, and chance would
look smaller than it is. The same cross-fitted probe is fitted to every shuffle: one factorisation per
fold and layer serves all of them. Random directions are drawn from the covariance of neutral texts, N(0, Sigma): a
direction along which states vary much separates any two groups of texts more, and one drawn evenly from all
directions (isotropic) hardly ever is such a direction, which makes it too easy to beat.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
from jaxtyping import Float, Int, Num
from scipy.stats import rankdata

from empathy_probes.auroc import correlation
from empathy_probes.probes import cross_fitted_scores, is_binary, shared_scores
from empathy_probes.stats import grouped_folds

DRAWS = 999
N_FOLDS = 5
# Shuffles whose scores are sorted together: few enough for the processor's cache.
AT_ONCE = 50


def shuffle_within(
    units: Sequence[str],
    scenarios: Sequence[str],
    labels: Num[np.ndarray, " n"],
    draws: int,
    seed: int,
) -> Int[np.ndarray, "draws n"]:
    """For every draw the text whose label each text gets: one of its own scenario's, another one for each label.

    All texts of a label move together, and likewise in all scenarios of a unit.
    """
    classes, place = np.unique(labels, return_inverse=True)
    # Sorted, so that the order of texts does not matter.
    names, member = np.unique(units, return_inverse=True)
    keys = np.random.default_rng([seed, 7]).random((draws, len(names), len(classes)))
    shuffled = np.empty((draws, len(place)), int)
    rows_of: dict[str, list[int]] = {}
    for i, scenario in enumerate(scenarios):
        rows_of.setdefault(scenario, []).append(i)
    for rows in map(np.array, rows_of.values()):
        there, first, own = np.unique(place[rows], return_index=True, return_inverse=True)
        order = keys[:, member[rows[0]], there].argsort(1)
        shuffled[:, rows] = rows[first][order][:, own]
    return shuffled


def permutation_null(
    features: Float[np.ndarray, "n layer d"],
    labels: Num[np.ndarray, "contrast n"],
    units: Sequence[str],
    scenarios: Sequence[str],
    folds: Int[np.ndarray, " n"],
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[Float[np.ndarray, "layer contrast n"], Float[np.ndarray, "draws layer"]]:
    """Cross-fitted scores, and AUROC (grades: correlation) of the same probe under shuffled labels; the mean over contrasts.

    The labels themselves and all their shuffles are read with one factorisation per fold and layer.
    """
    # A code per contrast tells categories apart too.
    order = shuffle_within(
        units, scenarios, np.unique(labels, axis=1, return_inverse=True)[1].ravel(), draws, seed
    )
    read = _aurocs if is_binary(labels) else correlation
    first, scores = shared_scores(features, features, (labels[0][order], labels), folds)
    others = (cross_fitted_scores(features, row[order], folds) for row in labels[1:])
    null = [
        read(found, row[order].astype(np.float64))
        for found, row in zip(chain([first], others), labels, strict=True)
    ]
    return scores, np.ascontiguousarray(np.mean(null, axis=0).T)


def _aurocs(
    scores: Float[np.ndarray, "layer draws n"], labels: Float[np.ndarray, "draws n"]
) -> Float[np.ndarray, "layer draws"]:
    p, n = labels.sum(-1), labels.shape[-1]
    bits = labels.astype(np.int64)
    wins = np.empty(scores.shape[:-1])
    for layer, values in enumerate(scores):
        for first in range(0, len(values), AT_ONCE):
            some = slice(first, first + AT_ONCE)
            # One sort instead of ranks: the label travels in the last bit of its score.
            tagged = (values[some].view(np.int64) & ~1) | bits[some]
            ordered = np.sort(tagged.view(np.float64), axis=-1).view(np.int64)
            wins[layer, some] = (ordered & 1) @ np.arange(1, n + 1)
            plain = (ordered & ~1).view(np.float64)
            tied = first + np.flatnonzero((plain[:, 1:] == plain[:, :-1]).any(-1))
            if len(tied):
                wins[layer, tied] = (rankdata(values[tied], axis=-1) * labels[tied]).sum(-1)
    return np.asarray((wins - p * (p + 1) / 2) / (p * (n - p)))


def largest_p(
    observed: Float[np.ndarray, " layer"], null: Float[np.ndarray, "draws layer"]
) -> Float[np.ndarray, " layer"]:
    """(1 + #{draws whose largest value over layers reaches the observed one}) / (draws + 1)."""
    largest = null.max(1)
    return (1 + (largest[:, None] >= observed - 1e-12).sum(0)) / (len(null) + 1)


def direction_gaps(
    differences: Float[np.ndarray, "unit layer d_model"],
    neutral: Float[np.ndarray, "m layer d_model"],
    units: Sequence[str],
    draws: int = DRAWS,
    seed: int = 0,
    *,
    contrast: int = 0,
    isotropic: bool = False,
) -> tuple[Float[np.ndarray, " layer"], Float[np.ndarray, "draws layer"]]:
    """How far the labels lie apart along the concept's own direction, and along random ones.

    The gap along w is |mean_s <D_s, w>| over the standard deviation of neutral states along w. The concept's direction is the
    mean difference of the other folds' scenarios, so that it owes nothing to the scenarios it is judged on.

    Args:
        differences: label 1 minus label 0 per scenario.
        neutral: states of neutral texts, in the same units.
        units: names of the scenarios, by which they are folded.
        draws: random directions.
        seed: of directions and folds.
        contrast: number of the contrast, of which each has directions of its own.
        isotropic: draw directions evenly instead of from the neutral covariance (to show what that does).
    """
    _, n_layers, d = differences.shape
    rng = np.random.default_rng([seed, 11, contrast])
    folds = grouped_folds(units, N_FOLDS, seed)
    observed, null = np.zeros(n_layers), np.zeros((draws, n_layers))
    for i in range(n_layers):
        x = neutral[:, i].astype(float)
        x = x - x.mean(0)
        own = differences[:, i].astype(float)
        directions = rng.standard_normal((draws, d if isotropic else len(x)))
        directions = directions if isotropic else directions @ x
        null[:, i] = abs(_gap(own.mean(0), directions, x))
        parts = [_gap(own[folds == f].mean(0), own[folds != f].mean(0)[None], x)[0] for f in range(N_FOLDS)]
        observed[i] = np.mean(parts)
    return observed, null


def _gap(mean: np.ndarray, directions: np.ndarray, x: np.ndarray) -> np.ndarray:
    spread = np.sqrt(((directions @ x.T) ** 2).mean(1))
    return np.divide(directions @ mean, spread, out=np.zeros(len(directions)), where=spread > 0)
