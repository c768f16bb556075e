"""Linear probes, at all layers and folds at once, in closed form.

Ridge regression of ±1 labels in its dual form: with centred training rows X and Gram matrix G = X Xᵀ, the
scores of held-out rows are (x Xᵀ)(G + λI)⁻¹ y; λ is the mean eigenvalue
of G, so the scores do not change when activations are scaled or rotated. One factorisation per fold and layer serves all
labellings, in the primal form where that is the smaller one. Folds are made of scenarios; every
score comes from a probe that saw no text of its scenario.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Num
from scipy.linalg import cho_factor, cho_solve

from empathy_probes.stats import Curve, critical_t, grouped_folds, mean_interval, widened

N_FOLDS = 5
# An interval over scenarios that takes the probes as given is too narrow by up to this: all probes were fitted on the same few
# scenarios. Without it coverage falls to .82 (scripts/simulations/readings.py); strong signals need less (`stats.widened`).
READING_FACTOR = 1.6
# The same of areas and correlations, which training moves less than bits and slopes.
AREA_FACTOR = 1.45
# Groups of scenarios that are left out in turn, all probes trained anew, where one model's probe reads another's states.
LEFT_OUT = 10


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


def left_out_scores(
    fitted: Float[np.ndarray, "n layer d"],
    reads: Sequence[Float[np.ndarray, "n layer d"]],
    labels: Num[np.ndarray, "contrast n"],
    folds: Int[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"],
) -> list[tuple[Int[np.ndarray, " kept"], Float[np.ndarray, "read layer contrast kept"]]]:
    """What `paired_scores` of each of `reads` would be without each group of texts in turn, and which texts are left.

    All probes are trained anew: how a reading differs between groups tells how far it errs, the luck of training included.
    """
    a, *b = (np.swapaxes(np.asarray(x, np.float64), 0, 1) for x in (fitted, *reads))
    n = len(folds)
    few_columns = a.shape[2] < min((folds != fold).sum() for fold in np.unique(folds))
    gram = None if few_columns else a @ np.swapaxes(a, 1, 2)
    cross = None if gram is None else np.concatenate([_products(x, a, gram) for x in b], 1)
    found = []
    for group in np.unique(groups):
        kept = np.flatnonzero(groups != group)
        some, of = labels[:, kept], folds[kept]
        if gram is None or cross is None:
            scores = np.stack([_few_columns(a[:, kept], x[:, kept], (some,), of)[0] for x in b])
        else:
            rows = (np.arange(len(b))[:, None] * n + kept).ravel()
            inner, other = gram[:, kept[:, None], kept], cross[:, rows[:, None], kept]
            scores = _stacked_scores(inner, other, some, of, len(b))
        found.append((kept, scores))
    return found


def _stacked_scores(
    gram: Float[np.ndarray, "layer n n"],
    cross: Float[np.ndarray, "layer rows n"],
    labels: Num[np.ndarray, "contrast n"],
    folds: Int[np.ndarray, " n"],
    reads: int,
) -> Float[np.ndarray, "read layer contrast n"]:
    """`_scores` of several sets of states with the same probes, one factorisation for all."""
    targets, n = _targets(labels), len(folds)
    scores = np.empty((len(gram), reads, n, targets.shape[1]))
    for fold in np.unique(folds):
        train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        rows = (np.arange(reads)[:, None] * n + test).ravel()
        read = _ridge_scores(gram, targets, train, rows, (1.0,), cross)[0] - targets[train].mean(0)
        scores[:, :, test] = read.reshape(len(gram), reads, len(test), -1)
    return np.moveaxis(scores, (0, 3), (1, 2))


def shared_scores(
    fitted: Float[np.ndarray, "n layer d"],
    read: Float[np.ndarray, "n layer d"],
    labellings: Sequence[Num[np.ndarray, "_ n"]],
    folds: Int[np.ndarray, " n"],
) -> list[Float[np.ndarray, "layer _ n"]]:
    """`paired_scores` of several sets of labellings, each to the last bit what it is alone."""
    a = np.swapaxes(np.asarray(fitted, np.float64), 0, 1)
    b = a if read is fitted else np.swapaxes(np.asarray(read, np.float64), 0, 1)
    if a.shape[2] < min((folds != fold).sum() for fold in np.unique(folds)):
        return _few_columns(a, b, labellings, folds)
    gram = a @ np.swapaxes(a, 1, 2)
    cross = None if read is fitted else _products(b, a, gram)
    return [_scores(gram, cross, labels, folds) for labels in labellings]


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
    targets = _targets(labels)
    scores = np.empty((*gram.shape[:2], targets.shape[1]))
    for fold in np.unique(folds):
        train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        # Without the training mean: folds of unequal balance would shift all their scores by it.
        scores[:, test] = _ridge_scores(gram, targets, train, test, (1.0,), cross)[0] - targets[train].mean(0)
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
        x, z = x - x.mean(0), z - x.mean(0)
        of_fold = [x[test] for test in held_out]
        inner = [out.T @ out for out in of_fold]
        whole = sum(inner)
        aims = [labelling.aims(of_fold) for labelling in asked]
        for fold, (test, out) in enumerate(zip(held_out, of_fold, strict=True)):
            many = len(x) - len(test)
            centre = -out.sum(0) / many
            left = whole - inner[fold] - many * np.outer(centre, centre)
            factor = _factor(left, np.trace(left) / many)
            for labelling, parts, found in zip(asked, aims, scores, strict=True):
                # Added up from the other folds, not taken off the whole: a text's own label must not even be in the rounding.
                aim, total = (sum(each[:fold] + each[fold + 1 :]) for each in (parts, labelling.totals))
                aim -= np.outer(total, centre)
                found[layer][:, test] = _apply(factor, aim.T, z[test] - centre).T
    return scores


class _Labelling:
    """Targets of every fold, and which texts have opposite ones in all labellings, as those of minimal pairs do."""

    def __init__(self, labels: Num[np.ndarray, "contrast n"], held_out: Sequence[Int[np.ndarray, " _"]]):
        targets = np.ascontiguousarray(_targets(labels).T)
        self.targets = [targets[:, test] for test in held_out]
        self.totals = [part.sum(1) for part in self.targets]
        self.opposed = [_opposites(part) for part in self.targets]

    def aims(self, of_fold: Sequence[Float[np.ndarray, "_ d"]]) -> list[Float[np.ndarray, "contrast d"]]:
        """Yᵀ X of every fold; y x + (−y) x' is y (x − x'), half the products."""
        return [
            part[:, one] @ (out[one] - out[other]) + part[:, alone] @ out[alone]
            for part, out, (one, other, alone) in zip(self.targets, of_fold, self.opposed, strict=True)
        ]


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


def _targets(labels: Num[np.ndarray, "contrast n"]) -> Float[np.ndarray, "n contrast"]:
    return np.ascontiguousarray((2.0 * labels - 1 if is_binary(labels) else labels.astype(float)).T)


def _factor(gram: Float[np.ndarray, "k k"], penalty: float) -> Float[np.ndarray, "k k"]:
    """Cholesky factor of G + λI. A layer on which all texts agree has an empty G: any penalty gives the score 0."""
    shifted = gram.copy()
    shifted.flat[:: len(gram) + 1] += penalty if penalty > 0 else 1.0
    # A symmetric matrix is its transpose, which LAPACK takes as it lies in memory.
    return cho_factor(shifted.T, overwrite_a=True)[0]


def _apply(
    factor: Float[np.ndarray, "k k"], aim: Float[np.ndarray, "k m"], read: Float[np.ndarray, "test k"]
) -> Float[np.ndarray, "test m"]:
    """read (G + λI)⁻¹ aim, with as many solves as there are labellings or rows to read, whichever are fewer."""
    if aim.shape[1] <= len(read):
        return read @ cho_solve((factor, False), aim)
    return (aim.T @ cho_solve((factor, False), read.T)).T


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


# ---------------------------------------------------------------- bits

# Penalties tried, in units of the mean eigenvalue of the training Gram matrix.
PENALTIES = (0.1, 1.0, 10.0)


def cross_fitted_losses(
    features: Float[np.ndarray, "n layer d"],
    labels: Int[np.ndarray, " n"],
    units: Sequence[str],
    *,
    given: Int[np.ndarray, " n"] | None = None,
    seed: int = 0,
    repeats: int = 2,
) -> Float[np.ndarray, "layer unit"]:
    """Log-loss in bits of a nested ridge probe, averaged over each unit's texts and over fold repeats.

    Penalty and Platt map (one slope with an N(0, 1) prior on standardised scores, one intercept per class) come from
    inner out-of-fold scores only: a map fitted on in-sample scores is far too sure of itself.

    Args:
        features: one row per text.
        labels: 0 to C - 1; two classes or more.
        units: scenario of each text; all folds keep it together.
        given: coarse class of each text, told to the probe: it chooses among the classes that occur in it.
        seed: of the folds.
        repeats: how many times folds are drawn.

    Returns:
        Per layer and unit, units in the order of their first text.
    """
    classes = np.eye(int(labels.max()) + 1)[labels]
    groups = np.zeros(len(labels), int) if given is None else given
    allowed = (np.eye(int(groups.max()) + 1)[groups].T @ classes > 0)[groups]

    def judge(inner: np.ndarray, outer: np.ndarray, train: np.ndarray, test: np.ndarray) -> _Judged:
        centre = inner.mean((2, 3), keepdims=True)
        spread = np.maximum(inner.std((2, 3), keepdims=True), 1e-12)
        known = (inner - centre) / spread
        fitted = _fit_platt(known, classes[train], allowed[train])
        losses = [
            _cross_entropy(_logits(scores, *fitted, allowed[rows]), classes[rows])
            for scores, rows in ((known, train), ((outer - centre) / spread, test))
        ]
        return losses[0].mean(-1), losses[1]

    return _nested_losses(features, classes, units, judge, seed, repeats)


def cross_fitted_grade_losses(
    features: Float[np.ndarray, "n layer d"],
    grades: Float[np.ndarray, " n"],
    units: Sequence[str],
    *,
    seed: int = 0,
    repeats: int = 2,
) -> Float[np.ndarray, "layer unit"]:
    """The same for graded labels: log-loss in bits of a normal distribution around a line in the nested probe's score.

    Line and spread come from inner out-of-fold scores. Losses are differential: only their difference from
    `grade_entropy` (or from another model's) means anything. Arguments as in `cross_fitted_losses`.
    """

    def judge(inner: np.ndarray, outer: np.ndarray, train: np.ndarray, test: np.ndarray) -> _Judged:
        y = grades[train]
        x, new = inner[..., 0], outer[..., 0]
        centre = x.mean(-1, keepdims=True)
        size = ((x - centre) ** 2).sum(-1, keepdims=True)
        slope = ((x - centre) * (y - y.mean())).sum(-1, keepdims=True) / np.where(size > 0, size, 1.0)
        left = ((y - y.mean() - slope * (x - centre)) ** 2).sum(-1, keepdims=True)
        variance = np.maximum(left / (len(y) - 2), 1e-12 * y.var())
        missed = grades[test] - y.mean() - slope * (new - centre)
        return np.log(variance[..., 0]), np.log(2 * np.pi * variance) / 2 + missed**2 / (2 * variance)

    return _nested_losses(features, grades[:, None], units, judge, seed, repeats)


# Loss per penalty and layer on inner folds, and per penalty, layer and held-out text.
_Judged = tuple[Float[np.ndarray, "penalty layer"], Float[np.ndarray, "penalty layer test"]]


def _nested_losses(
    features: Float[np.ndarray, "n layer d"],
    targets: Float[np.ndarray, "n m"],
    units: Sequence[str],
    judge: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], _Judged],
    seed: int,
    repeats: int,
) -> Float[np.ndarray, "layer unit"]:
    """Held-out losses of the penalty that does best on inner out-of-fold scores, in bits per unit."""
    rows = np.swapaxes(features.astype(np.float64), 0, 1)
    gram = rows @ np.swapaxes(rows, 1, 2)
    total = np.zeros(gram.shape[:2])
    for repeat in range(repeats):
        outer = grouped_folds(units, N_FOLDS, seed * 1000 + 2 * repeat)
        for fold in range(N_FOLDS):
            train, test = np.flatnonzero(outer != fold), np.flatnonzero(outer == fold)
            inner = grouped_folds([units[int(i)] for i in train], N_FOLDS, seed * 1000 + 2 * repeat + 1)
            scores = np.empty((len(PENALTIES), len(gram), len(train), targets.shape[1]))
            for held_out in range(N_FOLDS):
                a, b = train[inner != held_out], train[inner == held_out]
                scores[:, :, inner == held_out] = _ridge_scores(gram, targets, a, b, PENALTIES)
            known, losses = judge(scores, _ridge_scores(gram, targets, train, test, PENALTIES), train, test)
            total[:, test] += losses[known.argmin(0), np.arange(len(gram))] / repeats
    order = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    place = np.array([order[unit] for unit in units])
    share = np.eye(len(order))[place] / np.bincount(place)
    return np.asarray(total @ share / np.log(2))


def _ridge_scores(
    gram: Float[np.ndarray, "layer n n"],
    targets: Float[np.ndarray, "n m"],
    train: Int[np.ndarray, " train"],
    test: Int[np.ndarray, " test"],
    penalties: Sequence[float],
    cross: Float[np.ndarray, "layer rows n"] | None = None,
) -> Float[np.ndarray, "penalty layer test m"]:
    """Ridge predictions of held-out rows, with an intercept; penalties in units of the mean eigenvalue.

    `cross` holds the inner products of the rows to be read (another model's) with the training rows; `gram` by default.
    """
    inner = gram[:, train[:, None], train]
    column = inner.mean(1, keepdims=True)
    centred = inner - column - np.swapaxes(column, 1, 2) + column.mean(2, keepdims=True)
    # The weights sum to 0, so of the test rows' centring only this part changes a score.
    read = (gram if cross is None else cross)[:, test[:, None], train] - column
    mean = targets[train].mean(0)
    aim = targets[train] - mean
    scores = np.empty((len(penalties), len(gram), len(test), aim.shape[1]))
    for layer, (g, r) in enumerate(zip(centred, read, strict=True)):
        scale = np.trace(g) / len(train)
        for k, p in enumerate(penalties):
            scores[k, layer] = _apply(_factor(g, p * scale), aim, r)
    return scores + mean


# Logit of a class that cannot be: finite, so that 0 times it is 0.
IMPOSSIBLE = -1e9


def _logits(
    scores: Float[np.ndarray, "*batch n m"],
    slope: Float[np.ndarray, "*batch"],
    intercept: Float[np.ndarray, "*batch m"],
    allowed: Bool[np.ndarray, "n m"],
) -> Float[np.ndarray, "*batch n m"]:
    # (C - 1)/C makes two classes the usual logistic of one standardised score.
    factor = (scores.shape[-1] - 1) / scores.shape[-1]
    logits = factor * slope[..., None, None] * scores + intercept[..., None, :]
    return np.where(allowed, logits, IMPOSSIBLE)


def _cross_entropy(
    logits: Float[np.ndarray, "*batch n m"], classes: Float[np.ndarray, "n m"]
) -> Float[np.ndarray, "*batch n"]:
    return np.asarray(np.logaddexp.reduce(logits, -1) - (logits * classes).sum(-1))


def _fit_platt(
    scores: Float[np.ndarray, "*batch n m"],
    classes: Float[np.ndarray, "n m"],
    allowed: Bool[np.ndarray, "n m"],
) -> tuple[Float[np.ndarray, "*batch"], Float[np.ndarray, "*batch m"]]:
    """Slope and intercepts by Newton's method on the penalised log-likelihood (convex)."""
    m = scores.shape[-1]
    factor = (m - 1) / m
    theta = np.zeros((*scores.shape[:-2], 1 + m))
    # The slope's prior; the intercepts' is next to none and only fixes their common shift.
    prior = np.diag([1.0, *[1e-6] * m])
    for _ in range(20):
        logits = _logits(scores, theta[..., 0], theta[..., 1:], allowed)
        p = np.exp(logits - np.logaddexp.reduce(logits, -1, keepdims=True))
        slack = p - classes
        gradient = np.concatenate([factor * (slack * scores).sum((-2, -1))[..., None], slack.sum(-2)], -1)
        mean = (p * scores).sum(-1, keepdims=True)
        across = factor * p * (scores - mean)
        hessian = np.empty((*theta.shape, 1 + m))
        hessian[..., 0, 0] = factor**2 * (p * scores**2).sum((-2, -1)) - factor**2 * (mean**2).sum((-2, -1))
        hessian[..., 0, 1:] = hessian[..., 1:, 0] = across.sum(-2)
        hessian[..., 1:, 1:] = np.eye(m) * p.sum(-2)[..., None, :] - np.swapaxes(p, -1, -2) @ p
        step = np.linalg.solve(hessian + prior, (gradient + theta @ prior)[..., None])[..., 0]
        theta = theta - np.clip(step, -2, 2)
        if abs(step).max() < 1e-8:
            break
    return theta[..., 0], theta[..., 1:]


def entropy(labels: Int[np.ndarray, " n"], given: Int[np.ndarray, " n"] | None = None) -> float:
    """Bits that knowing the label is worth, to one who knows the coarse class where one is `given`."""
    if given is not None:
        return entropy(np.unique(np.stack([given, labels]), axis=1, return_inverse=True)[1]) - entropy(given)
    share = np.bincount(labels) / len(labels)
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def grade_entropy(grades: Float[np.ndarray, " n"]) -> float:
    """Differential entropy in bits of a normal distribution with the grades' variance."""
    return float(np.log2(2 * np.pi * np.e * grades.var()) / 2)


def bits(losses: Float[np.ndarray, "layer unit"], label_entropy: float, contrasts: int = 1) -> Curve:
    """What a probe trained on this many scenarios extracts: label entropy minus log-loss, 95 % interval.

    A probe that had bad luck with its scenarios learns next to nothing and has losses all alike: from their spread alone the
    interval held the truth in .82-.89 where 40 scenarios show little. The variance of the interval is therefore nowhere
    smaller than b (H - b), that of knowing a share b / H of the labels and nothing of the others, at the bits b it supposes;
    divided by how many `contrasts` a scenario shows, one fewer than categories.
    """
    n = losses.shape[-1]
    plain = paired_t(label_entropy - losses, 1 - losses.mean(-1) / label_entropy)
    centre, t = plain.value, critical_t(n - 1)
    # |centre - b| = factor t sqrt(b (H - b) / n), solved for b as in Wilson's interval.
    weight = (READING_FACTOR * t) ** 2 / (n * contrasts)
    middle = centre + weight * label_entropy / 2
    found = middle**2 - (1 + weight) * centre**2
    # Where all texts are the same state, no scenarios would teach anything.
    empty = np.ptp(losses, axis=-1) < 1e-12
    root = np.sqrt(np.where((found >= 0) & ~empty, found, np.nan))
    ends = (middle - root) / (1 + weight), (middle + root) / (1 + weight)
    return Curve(centre, np.fmin(plain.lower, ends[0]), np.fmax(plain.upper, ends[1]))


def grade_bits(losses: Float[np.ndarray, "layer unit"], label_entropy: float) -> Curve:
    """The same of grades, whose bits have no upper bound: a t interval over scenarios."""
    return paired_t(label_entropy - losses)


def bits_difference(
    base: Float[np.ndarray, "layer unit"],
    aligned: Float[np.ndarray, "layer unit"],
    label_entropy: float | None = None,
) -> Curve:
    """bits(aligned) - bits(base) from two models' losses on the same units, paired t over units.

    Without the entropy of the labels (grades have none that bounds their bits) as wide as where nothing is read.
    """
    share = np.zeros(len(base))
    if label_entropy is not None:
        share = 1 - np.minimum(base.mean(-1), aligned.mean(-1)) / label_entropy
    return paired_t(base - aligned, share)


def paired_t(
    values: Float[np.ndarray, "layer unit"], share: Float[np.ndarray, " layer"] | float = 0.0
) -> Curve:
    """Mean over units whose probes share scenarios, 95 % t interval widened for that (`share` as in `stats.widened`)."""
    plain = mean_interval(values)
    reach = widened(np.broadcast_to(share, plain.value.shape), READING_FACTOR) * (plain.upper - plain.value)
    return Curve(plain.value, plain.value - reach, plain.value + reach)
