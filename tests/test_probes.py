"""Probes in closed form equal scikit-learn's, fold by fold, and know nothing of the texts they score."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from empathy_probes.probes import cross_fitted_scores, lexical_scores
from empathy_probes.stats import auroc, grouped_folds


def data(n: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = np.tile([1, 0], n // 2)
    units = [str(i // 2) for i in range(n)]
    features = generator.normal(size=(n, 3, 90)) + 5.0
    features[:, 1] += labels[:, None] * 0.4
    return features, labels, units, grouped_folds(units, 5, seed)


def test_scores_equal_scikit_learns_ridge_with_the_same_penalty() -> None:
    features, labels, _, folds = data()
    scores = cross_fitted_scores(features, labels, folds)
    for layer in range(features.shape[1]):
        rows = features[:, layer]
        for fold in range(5):
            train = folds != fold
            penalty = ((rows[train] - rows[train].mean(0)) ** 2).sum() / train.sum()
            probe = Ridge(alpha=penalty).fit(rows[train], 2 * labels[train] - 1)
            # Our scores leave out the intercept of the labels, which is the same for a whole fold.
            expected = probe.predict(rows[~train]) - (2 * labels[train] - 1).mean()
            np.testing.assert_allclose(scores[layer, ~train], expected, atol=1e-9)


def test_a_texts_own_label_never_reaches_its_score() -> None:
    features, labels, _, folds = data()
    flipped = np.where(folds == 2, 1 - labels, labels)
    before, after = (cross_fitted_scores(features, y, folds) for y in (labels, flipped))
    np.testing.assert_array_equal(before[:, folds == 2], after[:, folds == 2])
    assert not np.allclose(before[:, folds != 2], after[:, folds != 2])


def test_scale_and_rotation_change_no_score() -> None:
    features, labels, _, folds = data()
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(90, 90)))[0]
    before = cross_fitted_scores(features, labels, folds)
    np.testing.assert_allclose(cross_fitted_scores(7 * features @ rotation, labels, folds), before, atol=1e-8)


def test_noise_scores_at_chance_and_a_planted_signal_above() -> None:
    at_chance, planted = [], []
    for seed in range(40):
        features, labels, _, folds = data(seed=seed)
        scores = cross_fitted_scores(features, labels, folds)
        at_chance.append(auroc(scores, labels)[0])
        planted.append(auroc(scores, labels)[1])
    # The mean of 40 areas of 60 texts each has a standard error of about .012.
    assert abs(np.mean(at_chance) - 0.5) < 0.05 and np.mean(planted) > 0.75


def test_texts_that_do_not_differ_at_a_layer_score_zero() -> None:
    features, labels, _, folds = data()
    features[:, 0] = 1.0
    assert (cross_fitted_scores(features, labels, folds)[0] == 0).all()


@pytest.mark.parametrize(("word", "floor"), [("happy", 0.9), ("", 0.0)])
def test_the_bag_of_words_finds_a_keyword_and_nothing_where_there_is_none(word: str, floor: float) -> None:
    generator = np.random.default_rng(0)
    vocabulary = [f"word{i}" for i in range(50)]
    texts, labels, units = [], [], []
    for s in range(60):
        for label in (1, 0):
            texts.append(" ".join([*generator.choice(vocabulary, 8), word if label else ""]))
            labels.append(label)
            units.append(str(s))
    area = auroc(lexical_scores(texts, np.array(labels), units, 0)[None], np.array(labels))[0]
    assert area > floor and (word or abs(area - 0.5) < 0.15)
