"""Chance: shuffled labels and random directions."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from empathy_probes.nulls import direction_gaps, largest_p, permutation_null, shuffle_within
from empathy_probes.probes import cross_fitted_scores
from empathy_probes.stats import grouped_folds

LABELS = np.tile([1, 0], 40)
UNITS = [str(i // 2) for i in range(80)]
FOLDS = grouped_folds(UNITS, 5)
NAMES = [str(i) for i in range(60)]


def test_labels_are_shuffled_within_scenarios_only() -> None:
    shuffled = LABELS[shuffle_within(UNITS, UNITS, LABELS, 50, 0)]
    assert (shuffled.reshape(50, 40, 2).sum(-1) == 1).all()
    assert 0.4 < (shuffled == LABELS).mean() < 0.6


def test_texts_of_a_label_and_scenarios_of_a_cluster_move_together() -> None:
    labels, scenarios = np.tile([1, 1, 0, 0], 20), [str(i // 4) for i in range(80)]
    clusters = [str(i // 8) for i in range(80)]
    shuffled = labels[shuffle_within(clusters, scenarios, labels, 200, 0)]
    swapped = (shuffled != labels).reshape(200, 10, 8)
    assert (swapped == swapped[..., :1]).all() and 0.4 < swapped.mean() < 0.6
    assert 0.2 < (swapped[:, 0, 0] == swapped[:, 1, 0]).mean() < 0.8
    grades = np.tile([3.0, 1.0, 2.0], 20)
    alone = [str(i // 3) for i in range(60)]
    drawn = grades[shuffle_within(alone, alone, grades, 600, 0)].reshape(600, 20, 3)
    assert (np.sort(drawn) == [1, 2, 3]).all()
    for order in ((1, 2, 3), (2, 3, 1), (3, 1, 2), (3, 2, 1)):
        assert (drawn == order).all(-1).mean() == pytest.approx(1 / 6, abs=0.02)


def test_the_order_of_texts_changes_no_shuffle() -> None:
    order = np.random.default_rng(0).permutation(80)
    units = [UNITS[i] for i in order]
    moved = LABELS[order][shuffle_within(units, units, LABELS[order], 50, 0)]
    np.testing.assert_array_equal(moved, LABELS[shuffle_within(UNITS, UNITS, LABELS, 50, 0)][:, order])


def test_copies_of_a_text_make_chance_no_smaller() -> None:
    """They know no more than it: shuffled one by one, .17 of noise had a p of .05 and less."""
    x = np.random.default_rng(0).standard_normal((80, 1, 10))
    once = permutation_null(x, LABELS[None], UNITS, UNITS, FOLDS, 99)
    twice, units = np.repeat(x, 2, 0), [unit for unit in UNITS for _ in range(2)]
    found = permutation_null(twice, np.repeat(LABELS, 2)[None], units, units, np.repeat(FOLDS, 2), 99)
    assert found[1].std() == pytest.approx(once[1].std(), rel=0.05)
    assert np.corrcoef(found[1][:, 0], once[1][:, 0])[0, 1] > 0.95


def test_every_shuffle_gets_the_probe_it_would_get_alone() -> None:
    x = np.random.default_rng(0).standard_normal((80, 2, 10))
    own, null = permutation_null(x, LABELS[None], UNITS, UNITS, FOLDS, draws=4, seed=3)
    np.testing.assert_array_equal(own, cross_fitted_scores(x, LABELS[None], FOLDS))
    for draw, labels in enumerate(LABELS[shuffle_within(UNITS, UNITS, LABELS, 4, 3)]):
        for layer, scores in enumerate(cross_fitted_scores(x, labels[None], FOLDS)[:, 0]):
            np.testing.assert_allclose(null[draw, layer], roc_auc_score(labels, scores), atol=1e-12)


def test_equal_scores_share_their_ranks_in_a_shuffle_too() -> None:
    x = np.random.default_rng(0).integers(0, 2, (80, 2, 3)).astype(float)
    x[:, 1] = 1.0
    null = permutation_null(x, LABELS[None], UNITS, UNITS, FOLDS, draws=4, seed=3)[1]
    for draw, labels in enumerate(LABELS[shuffle_within(UNITS, UNITS, LABELS, 4, 3)]):
        scores = cross_fitted_scores(x, labels[None], FOLDS)[:, 0]
        np.testing.assert_allclose(null[draw], [roc_auc_score(labels, row) for row in scores], atol=1e-12)
        assert len(np.unique(scores[0])) < 80 and null[draw, 1] == 0.5


def test_p_of_noise_is_uniform_and_of_a_signal_the_smallest_there_is() -> None:
    rng = np.random.default_rng(1)
    p = []
    for seed in range(60):
        x = rng.standard_normal((80, 2, 10))
        own, null = permutation_null(x, LABELS[None], UNITS, UNITS, FOLDS, 99, seed)
        observed = np.array([roc_auc_score(LABELS, scores) for scores in own[:, 0]])
        p.append(largest_p(observed, null).min())
    assert (np.array(p) <= 0.05).mean() <= 0.15 and np.mean(p) > 0.3
    x[..., 0] += 3 * LABELS[:, None]
    own, null = permutation_null(x, LABELS[None], UNITS, UNITS, FOLDS, 99)
    observed = np.array([roc_auc_score(LABELS, scores) for scores in own[:, 0]])
    assert (largest_p(observed, null) == 0.01).all()


def test_a_direction_that_merely_varies_much_is_found_out_only_by_matched_directions() -> None:
    """A contrast of small size along the axis of largest variance: any state differs as much along it."""
    rng = np.random.default_rng(0)
    sd = np.array([12.0, *np.ones(399)])
    x = rng.standard_normal((500, 1, 400)) * sd
    d = rng.standard_normal((60, 1, 400)) * 0.3
    d[..., 0] += 3 + 6 * rng.standard_normal((60, 1))  # a quarter of a standard deviation there
    p = {}
    for isotropic in (False, True):
        observed, null = direction_gaps(d, x, NAMES, draws=499, isotropic=isotropic)
        p[isotropic] = (1 + (null >= observed).sum()) / 500
    assert p[True] < 0.05 < p[False]


def test_a_real_contrast_beats_matched_directions() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((500, 1, 40))
    d = rng.standard_normal((60, 1, 40)) * 0.3
    d[..., 5] += 2
    observed, null = direction_gaps(d, x, NAMES, draws=499)
    assert (null < observed).mean() > 0.99
