"""Linear probes, at all layers and folds at once, in closed form.

Ridge regression of ±1 labels in its dual form: with centred training rows X and Gram matrix G = X Xᵀ, the
scores of held-out rows are (x Xᵀ)(G + λI)⁻¹ y; λ is the mean eigenvalue
of G, so the scores do not change when activations are scaled or rotated. One factorisation per fold and layer serves all
labellings, in the primal form where that is the smaller one. Folds are made of scenarios; every
score comes from a probe that saw no text of its scenario.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num
from scipy.linalg import cho_factor, cho_solve

from empathy_probes.stats import Curve, grouped_folds, mean_interval

N_FOLDS = 5
# A t interval of slopes takes the probes as given and is too narrow by this: all were fitted on the same few scenarios
# (scripts/simulations/readings.py).
READING_FACTOR = 1.6
# The same of areas and correlations of a bag of words, up to this: strong signals need less (`auroc_intervals.widened`).
AREA_FACTOR = 1.45


def cross_fitted_scores(
    features: Float[np.ndarray, "n layer d"],
    labels: Num[np.ndarray, "contrast n"],
    folds: Int[np.ndarray, " n"],
) -> Float[np.ndarray, "layer contrast n"]:
    """Out-of-fold ridge scores of every text at every layer, all labellings from one factorisation per fold and layer.

    Args:
        features: one row per text.
        labels: one row per contrast: 0 and 1, or grades (then scores are grades less the training mean).
        folds: fold of each text; texts of a scenario share one.
    """
    return paired_scores(features, features, labels, folds)


def paired_scores(
    fitted: Float[np.ndarray, "n layer d"],
    read: Float[np.ndarray, "n layer d"],
    labels: Num[np.ndarray, "contrast n"],
    folds: Int[np.ndarray, " n"],
) -> Float[np.ndarray, "layer contrast n"]:
    """Out-of-fold scores of one model's probes on another model's states of the same texts."""
    return shared_scores(fitted, read, (labels,), folds)[0]


def shared_scores(
    fitted: Float[np.ndarray, "n layer d"],
    read: Float[np.ndarray, "n layer d"],
    labellings: Sequence[Num[np.ndarray, "_ n"]],
    folds: Int[np.ndarray, " n"],
) -> list[Float[np.ndarray, "layer _ n"]]:
    """`paired_scores` of several sets of labellings, each to the last bit what it is alone."""
    a, *others = from_their_mean(fitted, *([] if read is fitted else [read]))
    b = others[0] if others else a
    if a.shape[2] < min((folds != fold).sum() for fold in np.unique(folds)):
        return _few_columns(a, b, labellings, folds)
    gram = a @ np.swapaxes(a, 1, 2)
    cross = None if read is fitted else _products(b, a, gram)
    return [_scores(gram, cross, labels, folds) for labels in labellings]


def from_their_mean(
    fitted: Float[np.ndarray, "n layer d"], *reads: Float[np.ndarray, "n layer d"]
) -> list[Float[np.ndarray, "layer n d"]]:
    """All states less the mean of those that probes are fitted on, which are 0 at a layer where all texts agree.

    What rounding would leave of them there, divided by what it leaves of their spread, is a score of any size.
    """
    found = [np.swapaxes(np.asarray(x, np.float64), 0, 1) for x in (fitted, *reads)]
    mean = found[0].mean(1, keepdims=True)
    found = [x - mean for x in found]
    agreed = (fitted == fitted[:1]).all((0, 2))
    for x in found:
        x[agreed] = 0
    return found


def _products(
    read: Float[np.ndarray, "layer n d"],
    fitted: Float[np.ndarray, "layer n d"],
    gram: Float[np.ndarray, "layer n n"],
) -> Float[np.ndarray, "layer n n"]:
    """Inner products of states read with those fitted on, whose own are `gram`.

    Equal states have the same to the last bit: BLAS may multiply a matrix by itself in another way than by its copy.
    """
    return gram if np.array_equal(read, fitted) else read @ np.swapaxes(fitted, 1, 2)


def _scores(
    gram: Float[np.ndarray, "layer n n"],
    cross: Float[np.ndarray, "layer n n"] | None,
    labels: Num[np.ndarray, "contrast n"],
    folds: Int[np.ndarray, " n"],
) -> Float[np.ndarray, "layer contrast n"]:
    targets = signed_targets(labels)
    scores = np.empty((*gram.shape[:2], targets.shape[1]))
    for fold in np.unique(folds):
        train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        scores[:, test] = _ridge_scores(gram, targets, train, test, cross)
    return np.ascontiguousarray(np.swapaxes(scores, 1, 2))


def _few_columns(
    fitted: Float[np.ndarray, "layer n d"],
    read: Float[np.ndarray, "layer n d"],
    labellings: Sequence[Num[np.ndarray, "_ n"]],
    folds: Int[np.ndarray, " n"],
) -> list[Float[np.ndarray, "layer _ n"]]:
    """The same probe in its primal form, (x − x̄) (XᵀX + λI)⁻¹ Xᵀ y, where there are more texts than columns."""
    held_out = [np.flatnonzero(folds == fold) for fold in np.unique(folds)]
    asked = [_Labelling(labels, held_out) for labels in labellings]
    scores = [np.empty((len(fitted), *labels.shape)) for labels in labellings]
    for layer, (x, z) in enumerate(zip(fitted, read, strict=True)):
        of_fold = [x[test] for test in held_out]
        inner = [out.T @ out for out in of_fold]
        whole = sum(inner)
        aims = [labelling.aims(of_fold) for labelling in asked]
        for fold, (test, out) in enumerate(zip(held_out, of_fold, strict=True)):
            many = len(x) - len(test)
            centre = -out.sum(0) / many
            left = whole - inner[fold] - many * np.outer(centre, centre)
            factor = factor_gram(left, np.trace(left) / many)
            for labelling, parts, found in zip(asked, aims, scores, strict=True):
                # Added up from the other folds, not taken off the whole: a text's own label must not even be in the rounding.
                aim, total = (
                    reduce(np.add, each[:fold] + each[fold + 1 :]) for each in (parts, labelling.totals)
                )
                if total.any():
                    aim -= np.outer(total, centre)
                found[layer][:, test] = _apply(factor, aim.T, z[test] - centre).T
    return scores


class _Labelling:
    """Targets of every fold, and which texts have opposite ones in all labellings, as those of minimal pairs do."""

    def __init__(self, labels: Num[np.ndarray, "contrast n"], held_out: Sequence[Int[np.ndarray, " _"]]):
        targets = np.ascontiguousarray(signed_targets(labels).T)
        self.targets = [targets[:, test] for test in held_out]
        self.totals = [part.sum(1) for part in self.targets]
        self.opposed = [_opposites(part) for part in self.targets]

    def aims(self, of_fold: Sequence[Float[np.ndarray, "_ d"]]) -> list[Float[np.ndarray, "contrast d"]]:
        """Yᵀ X of every fold; y x + (−y) x' is y (x − x'), half the products."""
        found = []
        for part, out, (one, other, alone) in zip(self.targets, of_fold, self.opposed, strict=True):
            aim = part[:, one] @ (out[one] - out[other])
            found.append(aim + part[:, alone] @ out[alone] if alone else aim)
        return found


def _opposites(targets: Float[np.ndarray, "contrast n"]) -> tuple[list[int], list[int], list[int]]:
    """Texts whose targets are opposite in every labelling, two and two, and all others."""
    waiting: dict[bytes, list[int]] = {}
    one, other = [], []
    for i, column in enumerate(targets.T):
        partners = waiting.get((-column).tobytes())
        if partners:
            one.append(partners.pop())
            other.append(i)
        else:
            waiting.setdefault(column.tobytes(), []).append(i)
    return one, other, sorted(i for left in waiting.values() for i in left)


def signed_targets(labels: Num[np.ndarray, "contrast n"]) -> Float[np.ndarray, "n contrast"]:
    """What a probe is trained towards: ±1, or the grades."""
    return np.ascontiguousarray((2.0 * labels - 1 if is_binary(labels) else labels.astype(float)).T)


def factor_gram(gram: Float[np.ndarray, "k k"], penalty: float) -> Float[np.ndarray, "k k"]:
    """Cholesky factor of G + λI. A layer on which all texts agree has an empty G: any penalty gives the score 0."""
    shifted = gram.copy()
    shifted.flat[:: len(gram) + 1] += penalty if penalty > 0 else 1.0
    # A symmetric matrix is its transpose, which LAPACK takes as it lies in memory.
    return cho_factor(shifted.T, overwrite_a=True, check_finite=False)[0]


def _apply(
    factor: Float[np.ndarray, "k k"], aim: Float[np.ndarray, "k m"], read: Float[np.ndarray, "test k"]
) -> Float[np.ndarray, "test m"]:
    """read (G + λI)⁻¹ aim, with as many solves as there are labellings or rows to read, whichever are fewer."""
    if aim.shape[1] <= len(read):
        return read @ cho_solve((factor, False), aim, check_finite=False)
    return (aim.T @ cho_solve((factor, False), read.T, check_finite=False)).T


def is_binary(labels: Num[np.ndarray, "..."]) -> bool:
    """Whether there are only the labels 0 and 1."""
    return bool(((labels == 0) | (labels == 1)).all())


def lexical_scores(
    texts: Sequence[str], labels: Num[np.ndarray, "contrast n"], units: Sequence[str], seed: int
) -> Float[np.ndarray, "contrast n"]:
    """Out-of-fold scores of a bag of words (TF-IDF and the same ridge): the lexical floor."""
    return counted_scores(count_words(texts)[0], labels, units, seed)


def counted_scores(
    counts: Any, labels: Num[np.ndarray, "contrast n"], units: Sequence[str], seed: int
) -> Float[np.ndarray, "contrast n"]:
    """The same from the sparse counts of `count_words`; vocabulary and weights are those of the training folds only."""
    from sklearn.feature_extraction.text import TfidfTransformer

    folds = grouped_folds(units, N_FOLDS, seed)
    scores = np.empty(labels.shape)
    for fold in np.unique(folds):
        held_out = folds == fold
        known = counts[:, np.flatnonzero(counts[~held_out].getnnz(0))]
        features = TfidfTransformer(sublinear_tf=True).fit(known[~held_out]).transform(known)
        gram = (features @ features.T).toarray()[None]
        scores[:, held_out] = _scores(gram, None, labels, held_out.astype(int))[0][:, held_out]
    return scores


def count_words(texts: Sequence[str], *, characters: bool = False) -> tuple[Any, list[str]]:
    """How often each word (or run of 2 to 5 characters) stands in each text, a sparse matrix; and the words."""
    from sklearn.feature_extraction.text import CountVectorizer

    # Single letters and punctuation are words too: "I" against "one" is a lexical cue.
    words = {"token_pattern": r"(?u)\b\w+\b|[^\w\s]"}
    vectorizer = CountVectorizer(**{"analyzer": "char", "ngram_range": (2, 5)} if characters else words)
    return vectorizer.fit_transform(texts), list(vectorizer.get_feature_names_out())


def _ridge_scores(
    gram: Float[np.ndarray, "layer n n"],
    targets: Float[np.ndarray, "n m"],
    train: Int[np.ndarray, " train"],
    test: Int[np.ndarray, " test"],
    cross: Float[np.ndarray, "layer rows n"] | None = None,
) -> Float[np.ndarray, "layer test m"]:
    """Ridge predictions of held-out rows, less the training mean: folds of unequal balance would shift all their scores by it.

    The penalty is the mean eigenvalue. `cross` holds the inner products of the rows to be read (another model's) with the
    training rows; `gram` by default.
    """
    inner = gram[:, train[:, None], train]
    column = inner.mean(1, keepdims=True)
    centred = inner - column - np.swapaxes(column, 1, 2) + column.mean(2, keepdims=True)
    # The weights sum to 0, so of the test rows' centring only this part changes a score.
    read = (gram if cross is None else cross)[:, test[:, None], train] - column
    aim = targets[train] - targets[train].mean(0)
    scores = np.empty((len(gram), len(test), aim.shape[1]))
    for layer, (g, r) in enumerate(zip(centred, read, strict=True)):
        scores[layer] = _apply(factor_gram(g, np.trace(g) / len(train)), aim, r)
    return scores


def paired_t(values: Float[np.ndarray, "layer unit"]) -> Curve:
    """Mean over units whose probes share scenarios, 95 % t interval widened for that."""
    plain = mean_interval(values)
    reach = READING_FACTOR * (plain.upper - plain.value)
    return Curve(plain.value, plain.value - reach, plain.value + reach)
