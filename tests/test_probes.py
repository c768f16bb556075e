"""Probes in closed form equal scikit-learn's, fold by fold, and know nothing of the texts they score."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge

from empathy_probes.auroc import auroc, smooth_auroc
from empathy_probes.auroc_intervals import area_difference, area_interval
from empathy_probes.jackknife import Jackknife, pair_variance
from empathy_probes.leaving_out import leave_out
from empathy_probes.probes import (
    count_words,
    counted_scores,
    cross_fitted_scores,
    lexical_scores,
    paired_scores,
)
from empathy_probes.stats import binomial_interval, grouped_folds


def data(n: int = 60, seed: int = 0, width: int = 90) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = np.tile([1, 0], n // 2)
    units = [str(i // 2) for i in range(n)]
    features = generator.normal(size=(n, 3, width)) + 5.0
    features[:, 1] += labels[:, None] * 0.4
    return features, labels, units, grouped_folds(units, 5, seed)


# More columns than texts, and fewer: the dual and the primal form.
WIDTHS = pytest.mark.parametrize("width", [90, 12])


@WIDTHS
def test_scores_equal_scikit_learns_ridge_with_the_same_penalty(width: int) -> None:
    features, labels, _, folds = data(width=width)
    scores = cross_fitted_scores(features, labels[None], folds)[:, 0]
    for layer in range(features.shape[1]):
        rows = features[:, layer]
        for fold in range(5):
            train = folds != fold
            penalty = ((rows[train] - rows[train].mean(0)) ** 2).sum() / train.sum()
            probe = Ridge(alpha=penalty).fit(rows[train], 2 * labels[train] - 1)
            # Our scores leave out the intercept of the labels, which is the same for a whole fold.
            expected = probe.predict(rows[~train]) - (2 * labels[train] - 1).mean()
            np.testing.assert_allclose(scores[layer, ~train], expected, atol=1e-9)


@WIDTHS
def test_a_texts_own_label_never_reaches_its_score(width: int) -> None:
    features, labels, _, folds = data(width=width)
    flipped = np.where(folds == 2, 1 - labels, labels)
    before, after = (cross_fitted_scores(features, y[None], folds)[:, 0] for y in (labels, flipped))
    np.testing.assert_array_equal(before[:, folds == 2], after[:, folds == 2])
    assert not np.allclose(before[:, folds != 2], after[:, folds != 2])


@WIDTHS
def test_scale_and_rotation_change_no_score(width: int) -> None:
    features, labels, _, folds = data(width=width)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(width, width)))[0]
    before = cross_fitted_scores(features, labels[None], folds)
    np.testing.assert_allclose(
        cross_fitted_scores(7 * features @ rotation, labels[None], folds), before, atol=1e-8
    )


def test_noise_scores_at_chance_and_a_planted_signal_above() -> None:
    at_chance, planted = [], []
    for seed in range(40):
        features, labels, _, folds = data(seed=seed)
        scores = cross_fitted_scores(features, labels[None], folds)[:, 0]
        at_chance.append(auroc(scores, labels)[0])
        planted.append(auroc(scores, labels)[1])
    # The mean of 40 areas of 60 texts each has a standard error of about .012.
    assert abs(np.mean(at_chance) - 0.5) < 0.05 and np.mean(planted) > 0.75


@WIDTHS
def test_a_labelling_scores_the_same_alone_and_among_many(width: int) -> None:
    features, labels, _, folds = data(width=width)
    many = np.stack([labels, *np.random.default_rng(0).integers(0, 2, (40, len(labels)))])
    np.testing.assert_allclose(
        cross_fitted_scores(features, many, folds)[:, 0],
        cross_fitted_scores(features, labels[None], folds)[:, 0], atol=1e-12,
    )  # fmt: skip


@WIDTHS
def test_a_probe_reads_another_model_as_scikit_learns_does_and_a_copy_as_its_own(width: int) -> None:
    features, labels, _, folds = data(width=width)
    other = features + np.random.default_rng(3).normal(size=features.shape)
    scores = paired_scores(features, other, labels[None], folds)[:, 0]
    for fold in range(5):
        train = folds != fold
        rows = features[train, 1]
        probe = Ridge(alpha=((rows - rows.mean(0)) ** 2).sum() / train.sum()).fit(rows, 2 * labels[train] - 1)
        expected = probe.predict(other[~train, 1]) - (2 * labels[train] - 1).mean()
        np.testing.assert_allclose(scores[1, ~train], expected, atol=1e-9)
    own = cross_fitted_scores(features, labels[None], folds)
    np.testing.assert_array_equal(paired_scores(features, features.copy(), labels[None], folds), own)


@WIDTHS
@pytest.mark.parametrize("state", [1.0, 0.7])
def test_texts_that_do_not_differ_at_a_layer_score_zero(width: int, state: float) -> None:
    features, labels, _, folds = data(width=width)
    features[:, 0] = state
    # Grades that do not balance within a fold: what rounding leaves of the states would be a score.
    for asked in (labels[None], np.random.default_rng(1).uniform(0, 3, (1, len(labels)))):
        assert (cross_fitted_scores(features, asked, folds)[0] == 0).all()
        assert (paired_scores(features, features + 1, asked, folds)[0] == 0).all()


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
    area = auroc(lexical_scores(texts, np.array([labels]), units, 0), np.array(labels))[0]
    assert area > floor and (word or abs(area - 0.5) < 0.15)


@pytest.mark.parametrize("characters", [False, True])
def test_a_floor_equals_scikit_learns_vectorizer_fitted_on_the_training_folds(characters: bool) -> None:
    generator = np.random.default_rng(3)
    words = ["I", "a", "met", "old", "new", "road", "rain", "!", "don't", "boats", "boat"]
    texts = [" ".join(generator.choice(words, 9)) for _ in range(40)]
    labels, units = np.tile([1, 0], 20), [str(i // 2) for i in range(40)]
    kind: dict[str, object] = {"token_pattern": r"(?u)\b\w+\b|[^\w\s]"}
    kind = {"analyzer": "char", "ngram_range": (2, 5)} if characters else kind
    folds, expected = grouped_folds(units, 5, 7), np.zeros(40)
    for fold in range(5):
        train = folds != fold
        vectorizer = TfidfVectorizer(sublinear_tf=True, **kind).fit(np.array(texts)[train])
        features = vectorizer.transform(texts).toarray()[:, None]
        expected[~train] = cross_fitted_scores(features, labels[None], folds)[0, 0, ~train]
    counts, _ = count_words(texts, characters=characters)
    np.testing.assert_allclose(counted_scores(counts, labels[None], units, 7)[0], expected, atol=1e-12)


def test_two_probes_that_learnt_from_the_same_scenarios_share_the_luck_of_it() -> None:
    rng = np.random.default_rng(2)
    n, draws, width = 40, 300, 24
    labels, units = np.tile([0, 1], n), [str(i // 2) for i in range(2 * n)]
    folds = grouped_folds(units, 5)
    shared, *own = rng.standard_normal((3, 2 * n, draws, width))
    models = [np.sqrt(0.8) * shared + np.sqrt(0.2) * x for x in own]
    for states, gap in zip(models, (1.5, 0.6), strict=True):
        states[..., 0] += gap * labels[:, None]
    scores = [cross_fitted_scores(x, labels[None], folds) for x in models]
    pair = []
    for x, read in zip(models, scores, strict=True):
        found = leave_out(x, [x], labels[None], folds, units, smooth_auroc)
        pair.append(Jackknife(auroc(read, labels[None]), found.left_out[0], found.pairs[0]))
    pairs = pair_variance(*scores, labels[None], units, beyond_ramps=True)
    curve = area_difference(*pair, np.zeros(draws, bool), pairs)
    truth = curve.value.mean()
    held = binomial_interval(int(((curve.lower <= truth) & (truth <= curve.upper)).sum()), draws)
    assert held.upper > 0.93 and held.lower < 0.98
    alone = [area_interval(x) for x in pair]
    reach = np.sqrt(sum((x.upper - x.lower) ** 2 for x in alone))
    assert (curve.upper - curve.lower < 0.95 * reach).mean() > 0.95
