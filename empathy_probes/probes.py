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
from scipy.special import logsumexp

from empathy_probes.stats import Curve, critical_t, grouped_folds

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
    return _scores(rows @ np.swapaxes(rows, 1, 2), None, 2.0 * labels[:, None] - 1, folds)[..., 0]


def paired_scores(
    fitted: Float[np.ndarray, "n layer d"],
    read: Float[np.ndarray, "n layer d"],
    labels: Int[np.ndarray, " n"],
    folds: Int[np.ndarray, " n"],
) -> Float[np.ndarray, "layer n"]:
    """Out-of-fold scores of one model's probe on another model's states of the same texts."""
    a, b = (np.swapaxes(x.astype(np.float64), 0, 1) for x in (fitted, read))
    return _scores(a @ np.swapaxes(a, 1, 2), b @ np.swapaxes(a, 1, 2), 2.0 * labels[:, None] - 1, folds)[
        ..., 0
    ]


def shuffled_scores(
    features: Float[np.ndarray, "n layer d"],
    labels: Int[np.ndarray, "draws n"],
    folds: Int[np.ndarray, " n"],
) -> Float[np.ndarray, "layer n draws"]:
    """Out-of-fold scores under many labellings, all from one factorisation per fold and layer."""
    rows = np.swapaxes(features.astype(np.float64), 0, 1)
    return _scores(rows @ np.swapaxes(rows, 1, 2), None, 2.0 * labels.T - 1, folds)


def _scores(
    gram: Float[np.ndarray, "layer n n"],
    cross: Float[np.ndarray, "layer n n"] | None,
    targets: Float[np.ndarray, "n m"],
    folds: Int[np.ndarray, " n"],
) -> Float[np.ndarray, "layer n m"]:
    scores = np.empty((*gram.shape[:2], targets.shape[1]))
    for fold in np.unique(folds):
        train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        # Without the training mean: folds of unequal balance would shift all their scores by it.
        scores[:, test] = _ridge_scores(gram, targets, train, test, (1.0,), cross)[0] - targets[train].mean(0)
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


# ---------------------------------------------------------------- bits

# Penalties tried, in units of the mean eigenvalue of the training Gram matrix.
PENALTIES = (0.1, 1.0, 10.0)
# A paired t interval of bits, whose units share probes, is too narrow by about this (section 2 of the method; not
# measured again by us).
BITS_FACTOR = 1.3


def cross_fitted_losses(
    features: Float[np.ndarray, "n layer d"],
    labels: Int[np.ndarray, " n"],
    units: Sequence[str],
    *,
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
        seed: of the folds.
        repeats: how many times folds are drawn.

    Returns:
        Per layer and unit, units in the order of their first text.
    """
    rows = np.swapaxes(features.astype(np.float64), 0, 1)
    gram = rows @ np.swapaxes(rows, 1, 2)
    classes = np.eye(int(labels.max()) + 1)[labels]
    total = np.zeros(gram.shape[:2])
    for repeat in range(repeats):
        outer = grouped_folds(units, N_FOLDS, seed * 1000 + 2 * repeat)
        for fold in range(N_FOLDS):
            train, test = np.flatnonzero(outer != fold), np.flatnonzero(outer == fold)
            inner = grouped_folds([units[int(i)] for i in train], N_FOLDS, seed * 1000 + 2 * repeat + 1)
            scores = np.empty((len(PENALTIES), len(gram), len(train), classes.shape[1]))
            for held_out in range(N_FOLDS):
                a, b = train[inner != held_out], train[inner == held_out]
                scores[:, :, inner == held_out] = _ridge_scores(gram, classes, a, b, PENALTIES)
            centre = scores.mean((2, 3), keepdims=True)
            spread = np.maximum(scores.std((2, 3), keepdims=True), 1e-12)
            fitted = _fit_platt((scores - centre) / spread, classes[train])
            losses = _cross_entropy(_logits((scores - centre) / spread, *fitted), classes[train]).mean(-1)
            best, layer = losses.argmin(0), np.arange(len(gram))
            new = _ridge_scores(gram, classes, train, test, PENALTIES)[best, layer]
            new = (new - centre[best, layer]) / spread[best, layer]
            slope, intercept = (x[best, layer] for x in fitted)
            total[:, test] += _cross_entropy(_logits(new, slope, intercept), classes[test]) / repeats
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
    cross: Float[np.ndarray, "layer n n"] | None = None,
) -> Float[np.ndarray, "penalty layer test m"]:
    """Ridge predictions of held-out rows, with an intercept; penalties in units of the mean eigenvalue.

    `cross` holds the inner products of the rows to be read (another model's) with the training rows; `gram` by default.
    """
    inner = gram[:, train[:, None], train]
    column = inner.mean(1, keepdims=True)
    centred = inner - column - np.swapaxes(column, 1, 2) + column.mean(2, keepdims=True)
    # The weights sum to 0, so of the test rows' centring only this part changes a score.
    read = (gram if cross is None else cross)[:, test[:, None], train] - column
    scale = np.trace(centred, axis1=1, axis2=2) / len(train)
    # A layer on which all texts agree has an empty Gram matrix: any penalty gives the score 0.
    scale = np.where(scale > 0, scale, 1.0)[:, None, None] * np.eye(len(train))
    mean = targets[train].mean(0)
    aim = np.broadcast_to(targets[train] - mean, (len(gram), *targets[train].shape))
    return np.stack([read @ np.linalg.solve(centred + p * scale, aim) for p in penalties]) + mean


def _logits(
    scores: Float[np.ndarray, "*batch n m"],
    slope: Float[np.ndarray, "*batch"],
    intercept: Float[np.ndarray, "*batch m"],
) -> Float[np.ndarray, "*batch n m"]:
    # (C - 1)/C makes two classes the usual logistic of one standardised score.
    factor = (scores.shape[-1] - 1) / scores.shape[-1]
    return factor * slope[..., None, None] * scores + intercept[..., None, :]


def _cross_entropy(
    logits: Float[np.ndarray, "*batch n m"], classes: Float[np.ndarray, "n m"]
) -> Float[np.ndarray, "*batch n"]:
    return np.asarray(logsumexp(logits, -1) - (logits * classes).sum(-1))


def _fit_platt(
    scores: Float[np.ndarray, "*batch n m"], classes: Float[np.ndarray, "n m"]
) -> tuple[Float[np.ndarray, "*batch"], Float[np.ndarray, "*batch m"]]:
    """Slope and intercepts by Newton's method on the penalised log-likelihood (convex)."""
    m = scores.shape[-1]
    factor = (m - 1) / m
    theta = np.zeros((*scores.shape[:-2], 1 + m))
    # The slope's prior; the intercepts' is next to none and only fixes their common shift.
    prior = np.diag([1.0, *[1e-6] * m])
    for _ in range(20):
        logits = _logits(scores, theta[..., 0], theta[..., 1:])
        p = np.exp(logits - logsumexp(logits, -1, keepdims=True))
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


def entropy(labels: Int[np.ndarray, " n"]) -> float:
    """Bits that knowing the label is worth."""
    share = np.bincount(labels) / len(labels)
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def bits(losses: Float[np.ndarray, "layer unit"], label_entropy: float) -> Curve:
    """What a probe trained on this many scenarios extracts: label entropy minus log-loss, 95 % interval."""
    return _paired(label_entropy - losses)


def bits_difference(base: Float[np.ndarray, "layer unit"], aligned: Float[np.ndarray, "layer unit"]) -> Curve:
    """bits(aligned) - bits(base) from two models' losses on the same units, paired t over units."""
    return _paired(base - aligned)


def _paired(values: Float[np.ndarray, "layer unit"]) -> Curve:
    n = values.shape[-1]
    reach = BITS_FACTOR * critical_t(n - 1) * values.std(-1, ddof=1) / np.sqrt(n)
    centre = values.mean(-1)
    return Curve(centre, centre - reach, centre + reach)
