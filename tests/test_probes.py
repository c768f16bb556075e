"""Probes in closed form equal scikit-learn's, fold by fold, and know nothing of the texts they score."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge

from empathy_probes.probes import (
    AREA_FACTOR,
    _fit_platt,
    bits,
    bits_difference,
    count_words,
    counted_scores,
    cross_fitted_losses,
    cross_fitted_scores,
    entropy,
    left_out_scores,
    lexical_scores,
    paired_scores,
)
from empathy_probes.stats import (
    Jackknife,
    area_interval,
    auroc,
    auroc_interval,
    binomial_interval,
    grouped_folds,
)


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
def test_leaving_a_group_out_is_fitting_and_reading_without_it(width: int) -> None:
    features, labels, units, folds = data(width=width)
    other = features + np.random.default_rng(3).normal(size=features.shape)
    groups = grouped_folds(units, 4, seed=9)
    found = left_out_scores(features, [features, other], labels[None], folds, groups)
    assert len(found) == 4
    for group, (kept, scores) in enumerate(found):
        np.testing.assert_array_equal(kept, np.flatnonzero(groups != group))
        for read, states in zip(scores, (features, other), strict=True):
            alone = paired_scores(features[kept], states[kept], labels[None, kept], folds[kept])
            np.testing.assert_allclose(read, alone, atol=1e-12)


def test_the_luck_of_a_probe_with_states_it_was_not_made_for_is_in_its_interval() -> None:
    rng = np.random.default_rng(5)
    n, draws, width = 60, 120, 24
    labels, units = np.tile([0, 1], n), [str(i // 2) for i in range(2 * n)]
    folds, groups = grouped_folds(units, 5), grouped_folds(units, 10, seed=1)
    # The same noise in both models, and the concept elsewhere: a probe reads it as far as chance tilts it there.
    base = rng.standard_normal((2 * n, draws, width))
    aligned = base.copy()
    base[..., 0] += 1.5 * labels[:, None]
    aligned[..., 1] += 4 * labels[:, None]
    scores = paired_scores(base, aligned, labels[None], folds)[:, 0]
    value = auroc(scores, labels)
    without = [
        auroc(read[0, :, 0], labels[kept])
        for kept, read in left_out_scores(base, [aligned], labels[None], folds, groups)
    ]
    anew = area_interval(Jackknife(value, np.stack(without, -1), n))
    fixed = auroc_interval(scores, labels, units, AREA_FACTOR)
    held = [((c.lower <= value.mean()) & (value.mean() <= c.upper)).mean() for c in (anew, fixed)]
    assert held[0] > 0.9 and held[1] < 0.8


@WIDTHS
def test_texts_that_do_not_differ_at_a_layer_score_zero(width: int) -> None:
    features, labels, _, folds = data(width=width)
    features[:, 0] = 1.0
    assert (cross_fitted_scores(features, labels[None], folds)[0] == 0).all()


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


# ---------------------------------------------------------------- bits


def contrast(n: int, gap: float, seed: int = 0, width: int = 12) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    labels = np.tile([1, 0], n)
    rows = rng.standard_normal((2 * n, 2, width))
    rows[..., 0] += gap * labels[:, None]
    return rows, labels, [str(i // 2) for i in range(2 * n)]


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


def test_bits_are_none_on_noise_and_never_more_than_the_label_is_worth() -> None:
    none = [bits(cross_fitted_losses(*contrast(40, 0.0, seed)), 1.0).value for seed in range(12)]
    assert -0.08 < np.mean(none) < 0.02
    much = bits(cross_fitted_losses(*contrast(40, 12.0)), 1.0).value
    assert (much > 0.9).all() and (much <= 1).all()
    assert entropy(np.array([0, 1, 2, 3])) == 2 and entropy(np.array([0, 1, 0, 1])) == 1


def test_a_probe_that_learnt_nothing_does_not_know_that_there_is_nothing_to_learn() -> None:
    # All losses nearly alike: their spread says nothing about what other scenarios would have taught.
    alike = 0.99 + np.tile([-1e-3, 1e-3], 200)[None]
    curve = bits(alike[:, :40], 1.0)
    assert curve.value[0] == pytest.approx(0.01) and curve.upper[0] > 0.2 and curve.lower[0] < 0.001
    assert bits(alike, 1.0).upper[0] < 0.06
    # Four categories show three contrasts in every scenario; what a probe surely loses needs no such bound.
    assert bits(1 + alike[:, :40], 2.0, 3).upper[0] < bits(1 + alike[:, :40], 2.0).upper[0]
    # States that are all the same teach nothing for sure.
    same = bits(
        cross_fitted_losses(np.zeros((80, 1, 4)), np.tile([0, 1], 40), [str(i // 2) for i in range(80)]), 1.0
    )
    assert abs(np.array([same.value, same.lower, same.upper])).max() < 1e-9
    harmful = bits(1.5 + np.linspace(-0.1, 0.1, 40)[None], 1.0)
    assert harmful.lower[0] < harmful.value[0] < harmful.upper[0] < -0.4


def test_bits_of_a_weak_signal_cover_what_such_probes_extract_on_average() -> None:
    # Forty scenarios that show little: from the spread of losses alone .83 of intervals held the mean.
    rng = np.random.default_rng(5)
    labels, units = np.tile([0, 1], 40), [str(i // 2) for i in range(80)]
    rows = rng.standard_normal((80, 300, 24)) + 1.3 * labels[:, None, None] * np.eye(24)[0]
    curve = bits(cross_fitted_losses(rows, labels, units, repeats=1), 1.0)
    truth = curve.value.mean()
    assert 0.05 < truth < 0.3
    held = binomial_interval(int(((curve.lower <= truth) & (truth <= curve.upper)).sum()), 300)
    assert held.upper > 0.95 and held.value > 0.92


def test_bits_do_not_depend_on_scale_rotation_or_order() -> None:
    rows, labels, units = contrast(30, 1.5)
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((12, 12)))[0]
    first = cross_fitted_losses(rows, labels, units)
    np.testing.assert_allclose(cross_fitted_losses(5 * rows @ turn, labels, units), first, atol=1e-9)
    order = np.random.default_rng(2).permutation(60)
    moved = cross_fitted_losses(rows[order], labels[order], [units[i] for i in order])
    names = list(dict.fromkeys(units[i] for i in order))
    np.testing.assert_allclose(moved[:, [names.index(str(i)) for i in range(30)]], first, atol=1e-9)


def test_telling_every_text_three_times_adds_no_certainty() -> None:
    rows, labels, units = contrast(40, 1.5)
    once = bits(cross_fitted_losses(rows, labels, units), 1.0)
    thrice = bits(
        cross_fitted_losses(np.repeat(rows, 3, 0), np.repeat(labels, 3), list(np.repeat(units, 3))), 1.0
    )
    assert ((thrice.upper - thrice.lower) > 0.85 * (once.upper - once.lower)).all()


def test_the_calibration_of_two_classes_is_a_penalised_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    score = rng.standard_normal(200) + labels
    score = (score - score.mean()) / score.std()
    slope, intercept = _fit_platt(np.stack([-score, score], -1), np.eye(2)[labels], np.ones((200, 2), bool))
    peer = LogisticRegression(C=1.0).fit(score[:, None], labels)  # C = 1 is an N(0, 1) prior on the slope
    # Two class scores -s and s make a logit of slope * s: (C - 1)/C of their difference.
    np.testing.assert_allclose(slope, peer.coef_[0, 0], rtol=1e-3)
    np.testing.assert_allclose(intercept[1] - intercept[0], peer.intercept_[0], atol=1e-3)


def test_eight_classes_are_worth_up_to_three_bits() -> None:
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(8), 25)
    rows = 0.2 * rng.standard_normal((200, 1, 16)) + np.eye(16)[labels][:, None]
    found = bits(
        cross_fitted_losses(rows, labels, [str(i // 8) for i in range(200)], repeats=1), entropy(labels)
    )
    assert 2 < found.value[0] <= 3


def test_a_difference_of_bits_is_paired_and_exactly_zero_for_equal_models() -> None:
    losses = cross_fitted_losses(*contrast(40, 1.0))
    same = bits_difference(losses, losses)
    assert (same.value == 0).all() and (same.lower == 0).all() and (same.upper == 0).all()
    assert (bits_difference(losses, losses + 0.1).upper < 0).all()
    # The more one of the two reads, the less it depends on what it learnt from.
    other = losses + 0.1 * np.random.default_rng(0).standard_normal(losses.shape)
    wide, narrow = bits_difference(losses, other), bits_difference(losses, other, 1.0)
    share = 1 - np.minimum(losses.mean(-1), other.mean(-1))
    np.testing.assert_allclose(
        (narrow.upper - narrow.lower) / (wide.upper - wide.lower), (1.6 - 0.6 * share) / 1.6
    )
