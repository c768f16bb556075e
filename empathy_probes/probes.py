"""Linear probes, at all layers and folds at once, in closed form.

Ridge regression of ±1 labels in its dual form: with centred training rows X and Gram matrix G = X Xᵀ, the
scores of held-out rows are (x Xᵀ)(G + λI)⁻¹ y. One batched solve serves all layers; λ is the mean eigenvalue
of G, so the scores do not change when activations are scaled or rotated. Folds are made of scenarios; every
score comes from a probe that saw no text of its scenario.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from empathy_probes.stats import grouped_folds

N_FOLDS = 5


def cross_fitted_scores(
    features: Float[np.ndarray, "n layer d"],
    labels: Int[np.ndarray, " n"],
    folds: Int[np.ndarray, " n"],
) -> Float[np.ndarray, "layer n"]:
    """Out-of-fold ridge scores of every text at every layer.

    Args:
        features: one row per text.
        labels: 0 or 1.
        folds: fold of each text; texts of a scenario share one.
    """
    rows = np.swapaxes(features.astype(np.float64), 0, 1)
    gram = rows @ np.swapaxes(rows, 1, 2)
    scores = np.empty(gram.shape[:2])
    for fold in np.unique(folds):
        train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        inner = gram[:, train[:, None], train]
        # Centring by the training mean, written on Gram matrices.
        column = inner.mean(1, keepdims=True)
        centred = inner - column - np.swapaxes(column, 1, 2) + column.mean(2, keepdims=True)
        # The weights below sum to 0, so of the test rows' centring only this part changes a score.
        cross = gram[:, test[:, None], train] - column
        penalty = np.trace(centred, axis1=1, axis2=2) / len(train)
        # A layer on which all texts agree has an empty Gram matrix: any penalty gives the score 0.
        penalty = np.where(penalty > 0, penalty, 1.0)
        target = 2 * labels[train] - 1
        target = target - target.mean()
        ridge = centred + penalty[:, None, None] * np.eye(len(train))
        weights = np.linalg.solve(ridge, np.broadcast_to(target, (len(ridge), len(train)))[..., None])
        scores[:, test] = (cross @ weights)[..., 0]
    return scores


def lexical_scores(
    texts: Sequence[str], labels: Int[np.ndarray, " n"], units: Sequence[str], seed: int
) -> Float[np.ndarray, " n"]:
    """Out-of-fold scores of a bag of words (TF-IDF and the same ridge): the lexical floor.

    Vocabulary and weights are fitted on the training folds only.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    folds = grouped_folds(units, N_FOLDS, seed)
    scores = np.empty(len(texts))
    for fold in np.unique(folds):
        train = [text for text, f in zip(texts, folds, strict=True) if f != fold]
        # Single letters and punctuation are words too: "I" against "one" is a lexical cue.
        vectorizer = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b|[^\w\s]", sublinear_tf=True).fit(train)
        features = vectorizer.transform(texts).toarray()[:, None, :]
        held_out = (folds == fold).astype(int)
        scores[folds == fold] = cross_fitted_scores(features, labels, held_out)[0, folds == fold]
    return scores
