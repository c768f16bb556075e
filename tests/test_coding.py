"""Grades and categories: they extend two labels, and what is fine within coarse is told apart from what is coarse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, roc_auc_score

from empathy_probes.activations import Activations
from empathy_probes.attenuation import measure_attenuation
from empathy_probes.auroc_intervals import correlation_difference, correlation_interval
from empathy_probes.bits import (
    LOSS,
    cross_fitted_grade_losses,
    cross_fitted_losses,
    entropy,
    grade_entropy,
)
from empathy_probes.coding import coarse_numbers, scenario_contrasts
from empathy_probes.concepts import Concept
from empathy_probes.design import design_study
from empathy_probes.errors import InputError
from empathy_probes.grammar import stimuli_rows
from empathy_probes.measurements import ALIGNED, BASE, MAPPED, OWN, PLAIN, Measurement, measure_concept
from empathy_probes.phantoms import load_phantom
from empathy_probes.probes import cross_fitted_scores
from empathy_probes.rows import (
    bits_rows,
    granularity_rows,
    reading_rows,
    scenario_slopes,
    slope_rows,
    transfer_rows,
)
from empathy_probes.stats import grouped_folds
from empathy_probes.stimuli import stimuli_from_rows
from empathy_probes.study import Study, load_study

WIDTH = 12


def concept_of(labels: list[Any], n: int = 60, name: str = "demo", role: Any = "target") -> Concept:
    """n scenarios with one text of each label."""
    rows = [
        {"id": f"{s}-{i}", "scenario": str(s), "text": f"text {s} {i}", "label": label}
        for s in range(n)
        for i, label in enumerate(labels)
    ]
    return Concept(name, role, "", "", "user", "", stimuli_from_rows(rows, name))


def acts(values: np.ndarray) -> Activations:
    return Activations(values.astype(np.float32), (0,), "resid_post", "m", False)


def measured(concept: Concept, base: np.ndarray, aligned: np.ndarray) -> Measurement:
    neutral = acts(np.random.default_rng(9).standard_normal((80, 1, base.shape[-1])))
    n_contrasts = len(set(concept.stimuli.items[i].label for i in range(len(base)))) if isinstance(
        concept.stimuli.items[0].label, str
    ) else 1  # fmt: skip
    words = np.zeros((n_contrasts, len(base)))
    return measure_concept(
        concept, "raw", (acts(base), acts(aligned)), (neutral, neutral), words, 0, False, null_draws=19
    )


def states(n: int, parts: list[np.ndarray], noise: float = 1.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    total = np.tile(sum(parts), (n, 1)) + noise * rng.standard_normal((n * len(parts[0]), WIDTH))
    total += np.repeat(rng.standard_normal((n, WIDTH)), len(parts[0]), 0)
    return total[:, None]


def test_grades_zero_and_two_are_two_labels_at_half_the_slope() -> None:
    values = states(60, [np.outer([0, 1], np.eye(WIDTH)[0])])
    other = states(60, [np.outer([0, 0.4], np.eye(WIDTH)[0])], seed=1)
    concept = concept_of([0, 1])
    items = tuple(replace(item, label=2 * float(item.label)) for item in concept.stimuli.items)
    doubled = replace(concept, stimuli=replace(concept.stimuli, items=items, kind="graded"))
    two, graded = (measured(c, values, other) for c in (concept, doubled))
    assert (two.kind, graded.kind) == ("binary", "graded")
    np.testing.assert_allclose(graded.kernels, two.kernels / 4, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(graded.contrast.theta, two.contrast.theta, rtol=1e-4)
    np.testing.assert_allclose(graded.contrast.se, two.contrast.se, rtol=1e-4)
    np.testing.assert_allclose(graded.separation.theta, two.separation.theta, rtol=1e-4)


def test_two_categories_are_two_labels() -> None:
    values = states(60, [np.outer([0, 1], np.eye(WIDTH)[0])])
    other = states(60, [np.outer([0, 0.4], np.eye(WIDTH)[0])], seed=1)
    two, named = (measured(concept_of(labels), values, other) for labels in ([0, 1], ["no", "yes"]))
    assert named.kind == "categorical" and named.categories == ("no", "yes")
    np.testing.assert_allclose(named.kernels, two.kernels, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(named.views.losses, two.views.losses, atol=1e-6)
    for make in (reading_rows, bits_rows, transfer_rows):
        ours, theirs = (pd.DataFrame(make(m, 1, ())) for m in (named, two))
        numeric = ours.select_dtypes("number").columns
        np.testing.assert_allclose(ours[numeric].astype(float), theirs[numeric].astype(float), atol=1e-6)
    np.testing.assert_allclose(named.directions[:, 1], -named.directions[:, 0], atol=1e-6)


def test_a_category_is_contrasted_with_the_mean_of_the_others_within_the_scenario() -> None:
    rows = np.random.default_rng(0).standard_normal((40 * 3, 1, 4))
    contrasts = scenario_contrasts(rows, concept_of(["a", "b", "c"], 40).stimuli)
    np.testing.assert_allclose(contrasts[1, 0, 0], rows[1, 0] - (rows[0, 0] + rows[2, 0]) / 2)


def test_the_slope_of_a_scenario_is_least_squares() -> None:
    rows = np.random.default_rng(0).standard_normal((40 * 3, 1, 4))
    contrasts = scenario_contrasts(rows, concept_of([1, 2, 4], 40).stimuli)
    for k in range(4):
        slope = np.polyfit([1, 2, 4], rows[3:6, 0, k], 1)[0]
        np.testing.assert_allclose(contrasts[0, 1, 0, k], slope)


def test_scores_of_grades_are_ridge_predictions_and_their_reading_is_pearsons() -> None:
    rng = np.random.default_rng(0)
    grades, units = np.tile([0.0, 1.0, 3.0], 30), [str(i // 3) for i in range(90)]
    x = rng.standard_normal((90, 1, 20)) + grades[:, None, None] * rng.standard_normal((1, 1, 20)) / 3
    folds = grouped_folds(units, 5)
    scores = cross_fitted_scores(x, grades[None], folds)[0, 0]
    for fold in range(5):
        train = folds != fold
        rows = x[train, 0]
        peer = Ridge(alpha=((rows - rows.mean(0)) ** 2).sum() / train.sum()).fit(rows, grades[train])
        np.testing.assert_allclose(scores[~train], peer.predict(x[~train, 0]) - grades[train].mean())
    curve = correlation_interval(scores[None], grades, units)
    np.testing.assert_allclose(curve.value[0], pearsonr(scores, grades)[0])
    assert curve.lower[0] < curve.value[0] < curve.upper[0] <= 1


def test_macro_auroc_is_scikit_learns() -> None:
    names = ["a", "b", "c"]
    values = states(60, [0.8 * np.eye(WIDTH)[:3]])
    m = measured(concept_of(names), values, values)
    one_hot = m.codes.T
    expected = roc_auc_score(one_hot, m.scores[0, 0].T, average="macro")
    np.testing.assert_allclose(m.reading(BASE).value[0], expected)
    assert (m.reading_difference((BASE, OWN), (ALIGNED, OWN)).value == 0).all()


def test_what_scenarios_do_jointly_is_taken_off_readings_and_off_differences_of_two() -> None:
    base = states(60, [0.9 * np.eye(WIDTH)[:2]])
    m = measured(concept_of([0, 1]), base, base + states(60, [0.3 * np.eye(WIDTH)[:2]], 0.5, seed=1))
    none = replace(m, views=replace(m.views, pairs=np.zeros_like(m.views.pairs)))
    assert (m.views.pairs != 0).all()
    for read in (OWN, PLAIN, MAPPED):
        curves = [
            (x.reading(BASE, read), x.reading_difference((ALIGNED, OWN), (BASE, read))) for x in (m, none)
        ]
        for less, plain in zip(*curves, strict=True):
            assert (less.upper - less.lower < 0.99 * (plain.upper - plain.lower)).all()


def test_bits_of_grades_are_the_information_of_a_normal_channel() -> None:
    """Score = grade + noise: -log2(1 - r^2)/2 bits."""
    rng = np.random.default_rng(0)
    units = [str(i // 2) for i in range(1200)]
    grades = rng.standard_normal(1200)
    for noise, expected in ((0.5, np.log2(5) / 2), (1.0, 0.5), (30.0, 0.0)):
        x = (grades + noise * rng.standard_normal(1200))[:, None, None]
        found = (
            grade_entropy(grades, units) - cross_fitted_grade_losses(x, grades, units, repeats=1)[LOSS].mean()
        )
        assert abs(found - expected) < 0.08


def test_fine_within_coarse_is_a_multinomial_restricted_to_the_coarse_class() -> None:
    """Against scikit-learn: one logistic regression per coarse class, on well separated data."""
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(4), 150)
    x = rng.standard_normal((600, 1, 4)) * 0.5 + np.eye(4)[labels][:, None]
    units = [str(i // 4) for i in range(600)]
    coarse = labels // 2
    losses = cross_fitted_losses(x, labels, units, given=coarse, repeats=1)
    ours = entropy(labels, units, coarse) - losses[LOSS].mean()
    folds, theirs = grouped_folds(units, 5), []
    for fold in range(5):
        for c in range(2):
            train, test = (np.flatnonzero((coarse == c) & mask) for mask in (folds != fold, folds == fold))
            probe = LogisticRegression().fit(x[train, 0], labels[train])
            theirs.append(
                log_loss(labels[test], probe.predict_proba(x[test, 0]), labels=probe.classes_) / np.log(2)
            )
    assert abs(ours - (1 - np.mean(theirs))) < 0.03
    assert entropy(labels, units, coarse) == 1


def test_a_model_that_loses_the_fine_and_keeps_the_coarse_loses_granularity_only() -> None:
    names = ["bad/fear", "bad/anger", "good/joy", "good/pride"]
    e = np.eye(WIDTH)
    coarse = np.outer([-1, -1, 1, 1], e[0])
    fine = 2 * np.stack([e[1], e[2], e[3], e[4]])
    whole = states(80, [coarse, fine])
    lost = states(80, [coarse, 0.1 * fine], seed=1)
    m = measured(concept_of(names, 80), whole, lost)
    row = next(granularity_rows(m, 1, ()))
    assert row["measure"] == "granularity" and row["base"] > 0.4
    assert row["difference_upper"] < -0.3 and row["attenuation_lower"] > 0.5
    kept = measured(concept_of([0, 0.0001, 1, 1.0001], 80), whole, lost)  # graded by the coarse class
    reading = reading_rows(kept, 1, ())[0]
    assert reading["measure"] == "correlation" and abs(reading["difference"]) < 0.12
    assert not list(granularity_rows(kept, 1, ()))
    louder = measured(concept_of(names, 80), whole, states(80, [0.1 * coarse, fine], seed=2))
    row = next(granularity_rows(louder, 1, ()))
    assert row["difference_lower"] < 0 < row["difference_upper"]


def test_only_names_with_a_coarse_part_are_fine_within_coarse() -> None:
    labels = np.tile(np.arange(4.0), 3)
    assert coarse_numbers(["a", "b", "c", "d"], labels) is None
    assert coarse_numbers(["a/x", "a/y", "b/x", "c"], labels) is None
    assert coarse_numbers(["a/x", "a/y", "a/z", "a/w"], labels) is None
    assert coarse_numbers(["a/x", "b/x", "c/x", "d/x"], labels) is None
    found = coarse_numbers(["a/x", "a/y", "b/x", "b/y"], labels)
    assert found is not None and found.tolist() == [0, 0, 1, 1] * 3


def test_the_slope_of_a_reading_is_all_of_it_or_none() -> None:
    clear = states(80, [np.outer([0, 1, 2], 9 * np.eye(WIDTH)[0])], noise=0.05)
    clear -= np.repeat(clear[::3] - clear[::3].mean(0), 3, 0)  # nothing but the grade varies
    empty = states(80, [np.outer([0, 1, 2], 0 * np.eye(WIDTH)[0])], seed=3)
    m = measured(concept_of([0, 1, 2], 80), clear, empty)
    row = next(slope_rows(m, 1, ()))
    assert 0.4 < row["base"] < 1 and abs(row["aligned"]) < 0.1 and row["difference_upper"] < -0.3


def test_a_slope_is_one_of_a_scenario_also_where_scenarios_are_clustered() -> None:
    """Two scenarios of other grades and levels: all four texts together would lie on a falling line."""
    grades, scores = np.array([1.0, 2, 3, 4] * 2), np.array([[0.0, 1, -5, -4] * 2])
    scenarios, clusters = list("aabbccdd"), list("xxxxyyyy")
    assert scenario_slopes(scores, grades, scenarios, clusters).tolist() == [[1, 1]]
    assert scenario_slopes(scores, grades, clusters, clusters) == pytest.approx(-1.8)


def test_correlations_of_one_scores_do_not_differ() -> None:
    rng = np.random.default_rng(0)
    grades, units = np.tile([0.0, 1.0, 2.0], 30), [str(i // 3) for i in range(90)]
    a = grades + rng.standard_normal((1, 90))
    same = correlation_difference(a, a, grades, units)
    assert same.value[0] == same.lower[0] == same.upper[0] == 0
    worse = correlation_difference(a, a + 3 * rng.standard_normal((1, 90)), grades, units)
    assert worse.upper[0] < 0


def test_a_scenario_without_one_of_the_categories_is_refused() -> None:
    rows = [
        {"id": f"{s}-{y}", "scenario": str(s), "text": f"text {s} {y}", "label": y}
        for s in range(40)
        for y in ("joy", "fear", "pride")
        if (s, y) != (3, "pride")
    ]
    concept = Concept("demo", "target", "", "", "user", "", stimuli_from_rows(rows, "demo"))
    with pytest.raises(
        InputError, match=r"scenario '3': got no text of pride, expected one of every category"
    ):
        design_study(load_phantom("planted-valence"), [concept], template="raw")


def test_a_study_of_grades_and_categories_on_a_pair_that_lost_valence(tmp_path: Path) -> None:
    """The planted twin lost valence after block 3: the coarse part of emotion goes with it, its fine part stays."""
    concepts = [
        Concept(name, "target", "", "", "user", "", stimuli_from_rows(stimuli_rows(name, 60), name))
        for name in ("emotion", "degree")
    ]
    pair = load_phantom("planted-valence")
    finding = measure_attenuation(
        pair, concepts, template="raw", layers=(2, 3), draws=199, store=str(tmp_path / "store")
    )
    frame = finding.to_frame()
    planted = frame[(frame.layer == 3)].set_index(["concept", "measure"])
    emotion, degree = planted.loc["emotion"], planted.loc["degree"]
    assert emotion.attenuation["strength"] > 0.15 and abs(degree.attenuation["strength"]) < 0.1
    assert emotion.difference_upper["granularity"] > -0.1 and emotion.base["granularity"] > 0.2
    assert degree.base["correlation"] > 0.5 and 0 < degree.base["slope"] < 1
    before = frame[(frame.layer == 2) & (frame.measure == "strength")]
    assert (before.attenuation.abs() < 1e-6).all()
    floors = frame[frame.site == "text"].set_index("concept").measure
    assert floors.to_dict() == {"emotion": "auroc", "degree": "correlation"}

    study = Study("kinds", [finding])
    study.save(tmp_path / "run")
    again = load_study(tmp_path / "run")
    pd.testing.assert_frame_equal(again.results[0].to_frame(), frame)
    files = {path.name for path in (tmp_path / "run" / "vectors").iterdir()}
    assert "emotion-good-joy.base.raw.resid_post.safetensors" in files and len(files) == 2 * 9
    assert "degree.aligned.raw.resid_post.safetensors" in files
