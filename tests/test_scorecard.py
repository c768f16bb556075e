"""The scorecard: what a redraw says of a known truth, how cells are judged, and that an interrupted run goes on."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from threadpoolctl import threadpool_info

from empathy_probes import calibration, cli, redraws
from empathy_probes.activations import Activations
from empathy_probes.attacks import (
    gap_attenuation,
    in_raw_units,
    keyword_leak,
    keyword_rows,
    missing_texts,
    null_rows,
    shuffled_labels,
    told_often,
)
from empathy_probes.calibration import calibrate, full_twins, run_calibration
from empathy_probes.errors import InputError
from empathy_probes.kernels import strength_kernels, u_statistic
from empathy_probes.measurements import measure_concept
from empathy_probes.metrics import METRIC_WORDS, METRICS, Case, Target
from empathy_probes.phantoms import load_phantom_concepts
from empathy_probes.planting import FAMILIES, TRAINED, list_bases
from empathy_probes.populations import Options, Twin
from empathy_probes.redraws import CURVES, Outcomes, Population, Sample, holds, redraw
from empathy_probes.scorecard import Row, Scorecard, load_scorecard, proportion_row, score
from empathy_probes.scorepage import render_scorecard, write_scorecard
from empathy_probes.secondary import MEASURES, Exhibit, Readings, proportions, read_redraws
from empathy_probes.stats import Estimate

LAYERS, WIDTH, MANY = 4, 24, 900


def test_a_process_of_a_calibration_computes_on_one_thread() -> None:
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=calibration._one_thread) as pool:
        libraries = pool.submit(threadpool_info).result()
    assert libraries and all(library["num_threads"] == 1 for library in libraries)


def sample(name: str, role: str, keep: tuple[float, ...], seed: int) -> Sample:
    """A concept whose contrast is `keep` as strong in the second model, noise 4 times the squared signal."""
    rng = np.random.default_rng(seed)
    signal = np.zeros((LAYERS, WIDTH))
    signal[:, 0] = 0.3
    noise = rng.standard_normal((2, MANY, LAYERS, WIDTH)) * 0.6 / np.sqrt(WIDTH)
    noise[1] = 0.9 * noise[0] + np.sqrt(1 - 0.81) * noise[1]
    d = noise + np.stack([signal, signal * np.array(keep)[:, None]])[:, None]
    squares = 1 + 0.1 * rng.standard_normal((2, MANY, LAYERS))
    return Sample(name, role, d.astype(np.float32), squares)


@pytest.fixture(scope="module")
def population() -> Population:
    none = (1.0,) * LAYERS
    targets = [sample("valence", "target", (1, 1, 0.4, 0.4), 0), sample("distance", "target", none, 1)]
    controls = [sample(f"control-{j}", "control", none, 10 + j) for j in range(7)]
    return Population(tuple(range(LAYERS)), (*targets, *controls))


@pytest.fixture(scope="module")
def case(population: Population) -> Case:
    return Case("planted", "made up", "valence", 2, 0.4, redraw(population, 60, 100))


def test_the_truth_of_a_population_is_what_was_put_in(population: Population) -> None:
    truth = population.truth[0]
    np.testing.assert_allclose(truth[:, CURVES.index("attenuation")], [0, 0, 0.6, 0.6], atol=0.06)
    np.testing.assert_allclose(truth[:, CURVES.index("base")], 0.3, atol=0.02)


def test_redraws_compared_together_say_what_each_says_alone(
    population: Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = redraw(population, 60, 5)
    monkeypatch.setattr(redraws, "CACHED", 1)
    alone = redraw(population, 60, 5)
    for name in ("curves", "decisions", "minimum_detectable", "onset", "onset_none"):
        np.testing.assert_array_equal(getattr(together, name), getattr(alone, name))


def test_intervals_of_redraws_hold_the_truth_and_the_planted_concept_is_decided(case: Case) -> None:
    found = {row.metric: row for row in score([case])}
    for metric in (
        "coverage_base",
        "coverage_attenuation",
        "coverage_specific",
        "coverage_band",
        "onset_contains",
    ):
        assert found[metric].upper > 0.95, metric
    assert (
        found["decided"].value > 0.9 and found["false_alarm"].lower < 0.05 and abs(found["bias"].value) < 0.05
    )


def test_printed_points_are_a_selection_that_is_shown_beside_all(case: Case) -> None:
    curves = case.outcomes.curves.copy()
    point = curves[:, 0, 2, CURVES.index("attenuation"), 0]
    assert not np.isnan(point).all()
    low = point < np.nanmedian(point)
    point[~low] = np.nan
    found = {r.metric: r for r in score([replace(case, outcomes=replace(case.outcomes, curves=curves))])}
    expected = point[low].mean() - case.truth("attenuation")[0, 2]
    assert (
        found["bias_printed"].value == pytest.approx(expected, abs=1e-5) and found["bias_printed"].met is None
    )
    assert found["bias_printed"].value < found["bias"].value - 0.005


def test_both_ends_are_asked_of_all_pairs_that_keep_half_together(case: Case) -> None:
    ends = case.outcomes.curves.copy()
    ends[..., CURVES.index("attenuation"), 1:] = [0.4, 0.7]
    whole = replace(case, keep=0.6, outcomes=replace(case.outcomes, curves=ends))
    half = ends.copy()
    half[: len(half) // 2, ..., CURVES.index("attenuation"), 2] = 1
    faint = replace(whole, concept="distance", outcomes=replace(case.outcomes, curves=half))
    little = replace(faint, keep=0.3)
    rows = [row for row in score([whole, faint, little]) if row.metric == "two_sided"]
    assert {row.concept: row.value for row in rows} == {"valence": 1, "distance": 0.5, "": 0.75}
    assert [row.met for row in rows if row.architecture == "all"] == [False]
    assert all(row.met is None for row in rows if row.architecture != "all")
    assert next(r for r in score([whole]) if r.architecture == "all").met


def test_intervals_that_miss_are_seen(case: Case) -> None:
    moved = case.outcomes.curves.copy()
    moved[..., CURVES.index("attenuation"), :] += 0.3
    row = next(
        r
        for r in score([replace(case, outcomes=replace(case.outcomes, curves=moved))])
        if r.metric == "coverage_attenuation"
    )
    assert row.value < 0.5 and row.met is False


def test_a_claim_about_an_innocent_concept_is_a_false_alarm_and_one_about_the_planted_is_not(
    case: Case,
) -> None:
    claimed = np.zeros_like(case.outcomes.decisions)
    claimed[:, 0, 2:] = 1
    found = {r.metric: r for r in score([replace(case, outcomes=replace(case.outcomes, decisions=claimed))])}
    assert found["false_alarm"].value == 0
    claimed[:30, 0, 1] = 1  # the planted one too, before it is planted
    found = {r.metric: r for r in score([replace(case, outcomes=replace(case.outcomes, decisions=claimed))])}
    assert found["false_alarm"].value == 0.3
    claimed[:, 1] = 2
    found = {r.metric: r for r in score([replace(case, outcomes=replace(case.outcomes, decisions=claimed))])}
    assert found["false_alarm"].value == 1 and found["false_alarm"].met is False


def test_what_cannot_be_judged_meets_no_target(case: Case) -> None:
    """Bands far off and decisions everywhere: seen where all controls are usable, and no row at all where they are not."""
    curves = case.outcomes.curves.copy()
    curves[..., CURVES.index("band"), :] = 0.9, 0.85, 0.95
    wrong = replace(
        case.outcomes, curves=curves, decisions=np.ones_like(case.outcomes.decisions),
    )  # fmt: skip
    asked = ("coverage_band", "false_alarm")
    found = {r.metric: r.value for r in score([replace(case, outcomes=wrong)]) if r.metric in asked}
    assert found == {"coverage_band": 0, "false_alarm": 1}
    faint = replace(wrong, controls=np.full_like(wrong.controls, 0.05))
    assert {r.value for r in score([replace(case, outcomes=faint)]) if r.metric in asked} == {0, 1}, (
        "used all the same"
    )
    nowhere = replace(faint, usable=np.zeros_like(wrong.usable))
    assert not [r for r in score([replace(case, outcomes=nowhere)]) if r.metric in asked]


def test_the_sampling_error_of_the_rms_is_in_the_kernel() -> None:
    """Without it the variance of U / rms^2 is far too small where contrasts are clean and norms are not."""
    rng = np.random.default_rng(0)
    values, variances, naive = [], [], []
    for _ in range(300):
        d = np.zeros((50, 1, 3))
        d[..., 0] = 0.3 + 0.005 * rng.standard_normal((50, 1))
        q = 1 + 0.3 * rng.standard_normal((50, 1))
        u = u_statistic(strength_kernels(d, q)[0])
        values.append(float(u.value))
        variances.append(float(u.variance))
        flat = d / np.sqrt(q.mean())
        naive.append(float(u_statistic(np.einsum("sld,tld->lst", flat, flat)[0]).variance))
    assert 0.8 < np.mean(variances) / np.var(values) < 1.25
    assert np.mean(naive) / np.var(values) < 0.3


def test_equal_models_stay_equal_in_every_redraw() -> None:
    one = sample("valence", "target", (1,) * LAYERS, 0)
    same = replace(
        one, differences=np.stack([one.differences[0]] * 2), squares=np.stack([one.squares[0]] * 2)
    )
    controls = [replace(same, concept=f"c{j}", role="control") for j in range(6)]
    outcomes = redraw(Population(tuple(range(LAYERS)), (same, *controls), same_model=True), 40, 5)
    assert (outcomes.decisions == 3).all() and (outcomes.curves[..., CURVES.index("band"), :] == 0).all()


def test_a_rate_must_be_consistent_with_its_target_and_anything_else_in_it() -> None:
    coverage = Target(0.92, 0.98, consistent=True)
    assert coverage.met_by(Estimate(0.90, 0.87, 0.93, 100))
    assert not coverage.met_by(Estimate(0.90, 0.88, 0.91, 1000))
    assert not Target(0.90).met_by(Estimate(0.84, 0.71, 0.92, 50))
    assert str(Target(most=0.05)) == "≤ 0.05" and str(Target(0.92, 0.98)) == "0.92 to 0.98"


def test_decisions_are_scored_with_the_errors_of_fresh_scenarios() -> None:
    """Half of a population errs by the root of a half of what a fresh sample errs."""
    rng = np.random.default_rng(0)
    n, many, truth, spread = 320, 640, 0.1, 0.05
    halves = truth + spread * np.sqrt(1 - n / many) * rng.standard_normal(4000)
    curves = np.full((4000, 1, 1, len(CURVES), 3), np.nan, np.float32)
    curves[:, 0, 0, CURVES.index("band")] = halves[:, None] + np.array([0, -1.96, 1.96]) * spread
    outcomes = Outcomes(
        n, np.array([many]), ("a",), (0,), np.full((1, 1, len(CURVES)), truth), np.ones((6, 1)), curves,
        np.full((4000, 1, 1), 4, np.int8), np.ones((4000, 1), bool), np.zeros((4000, 1, 1)), np.zeros((4000, 1, 1), bool), np.zeros((4000, 1), bool),
    )  # fmt: skip
    assert ((halves - 1.96 * spread) > truth).mean() < 0.006
    case = Case("continued", "made up", None, None, None, outcomes)
    alarms = next(row for row in score([case]) if row.metric == "false_alarm")
    assert 0.015 < alarms.value < 0.035  # one side of five per cent
    # A point that is not printed takes nothing of that away.
    curves[::7, 0, 0, CURVES.index("band"), 0] = np.nan
    curves[1::7, 0, 0, CURVES.index("band")] = np.nan
    curves[2::7, 0, 0, CURVES.index("band"), 2] = 1.0
    some = next(row for row in score([case]) if row.metric == "false_alarm")
    assert 0.013 < some.value < 0.03


@pytest.mark.parametrize(("own", "held"), [(1.0, True), (0.1, False)])
def test_what_is_relative_to_controls_errs_with_the_scenarios_of_both(own: float, held: bool) -> None:
    """The truth lies .8 of the way to the end: beyond it once shortened as for controls, within it as for the target."""
    specific = CURVES.index("specific")
    curves = np.zeros((2, 2, 1, len(CURVES), 3), np.float32)
    for name, width in (("attenuation", own), ("specific", 1.0)):
        curves[:, 0, 0, CURVES.index(name)] = 1 - np.exp([0.0, width / 2, -width / 2])
    truth = np.zeros((2, 1, len(CURVES)))
    truth[0, 0, specific] = 0.8 * (1 - np.exp(-0.5))
    # As far off on the other side: on average not at all.
    curves[1, 0, 0, specific] += 2 * truth[0, 0, specific]
    outcomes = Outcomes(
        100, np.array([500, 200]), ("a", "b"), (0,), truth, np.ones((6, 1)), curves, np.zeros((2, 2, 1), np.int8),
        np.ones((2, 1), bool), np.zeros((2, 2, 1)), np.zeros((2, 2, 1), bool), np.zeros((2, 2), bool),
    )  # fmt: skip
    assert outcomes.covers()[0, 0, 0, specific] == held


def test_samples_of_two_bases_are_of_other_scenarios() -> None:
    """Their redraws are counted together; of the same scenarios they would be half as many."""
    seeds = [Twin(base, "identical").samples for base in ("llama-0", "llama-1", "llama-2")]
    assert np.diff(seeds).min() > Options((), redraws=1000).redraws


@pytest.mark.parametrize(("bias", "covered"), [(0.0, 0.95), (1.0, 0.83)])
def test_what_an_estimate_is_off_on_average_is_not_the_samples_doing(bias: float, covered: float) -> None:
    """Half of a population errs by less than fresh scenarios, but is off by as much: P(|z + bias| < 1.96) of both."""
    values = bias + np.sqrt(0.5) * np.random.default_rng(0).standard_normal(4000)
    intervals = values[:, None, None] + np.array([0, -1.96, 1.96])
    no = np.array([False])
    held = holds(np.zeros(1), intervals, 0.5, no, no).mean()
    assert held == pytest.approx(covered, abs=0.015)
    # Shortened whole, biased intervals would hold less.
    assert bias == 0 or held > (abs(values) < np.sqrt(0.5) * 1.96).mean() + 0.05


def test_a_blank_is_no_equivalence_where_the_concept_is_carried(case: Case) -> None:
    blank = replace(case.outcomes, decisions=np.zeros_like(case.outcomes.decisions))
    row = next(
        r for r in score([Case("rotated", "made up", None, None, None, blank)]) if r.metric == "equivalent"
    )
    assert row.value == 0 and row.met is False


def test_an_empty_confidence_set_is_a_miss(case: Case) -> None:
    curves = case.outcomes.curves.copy()
    curves[:10, ..., CURVES.index("attenuation"), :] = np.nan
    rows = [
        score([replace(case, outcomes=replace(case.outcomes, curves=c))])
        for c in (case.outcomes.curves, curves)
    ]
    whole, some = (next(r for r in found if r.metric == "coverage_attenuation") for found in rows)
    assert some.value <= whole.value - 9 / 100
    whole, some = (next(r for r in found if r.metric == "coverage_band") for found in rows)
    assert some.value <= whole.value - 0.08, "of the band too, for which nothing of these redraws is left"


def test_an_interval_without_width_that_misses_is_a_miss(case: Case) -> None:
    curves = case.outcomes.curves.copy()
    curves[:10, :, :, CURVES.index("aligned")] = 0.0
    found = [
        next(r for r in score([replace(case, outcomes=replace(case.outcomes, curves=c))]) if r.metric == "coverage_aligned")
        for c in (case.outcomes.curves, curves)
    ]  # fmt: skip
    assert found[1].redraws == found[0].redraws == 100 and found[1].value <= found[0].value - 0.08


def test_few_redraws_are_held_against_no_rate(case: Case) -> None:
    """The interval of forty reaches into nearly any target."""
    few = replace(
        case.outcomes,
        **{
            name: getattr(case.outcomes, name)[:40]
            for name in ("curves", "decisions", "usable", "minimum_detectable", "onset", "onset_none")
        },
    )
    rows = {row.metric: row for row in score([replace(case, outcomes=few)])}
    assert rows["coverage_base"].met is None and rows["coverage_base"].target == "0.92 to 0.98"
    assert rows["onset_contains"].met is not None


def test_too_small_a_population_is_refused(population: Population) -> None:
    with pytest.raises(InputError, match="too few to draw 500"):
        redraw(population, 500, 2)


def test_a_saved_scorecard_is_the_scorecard_and_its_page_has_the_same_bytes(
    case: Case, tmp_path: Path
) -> None:
    provenance = {"version": "0", "redraws": 60, "population": 900, "others": 900, "draws": 1000, "nuisance": 0.5,
                  "doubt": 0.2, "seed": 0, "sizes": [60], "bases": ["made up"], "pairs": 1}  # fmt: skip
    card = Scorecard(score([case]), provenance)
    card.save(tmp_path)
    again = load_scorecard(tmp_path)
    assert again == card
    page = write_scorecard(again, tmp_path / "scorecard.html").read_text(encoding="utf8")
    assert page == render_scorecard(card) and "coverage attenuation" in page and 'src="http' not in page
    assert {row.metric for row in card.rows} <= set(METRICS) < set(METRIC_WORDS)
    header = (tmp_path / "scorecard.csv").read_text().splitlines()[0]
    assert header == "family,architecture,concept,n,metric,value,lower,upper,target,met"


def test_the_shipped_scorecard_sums_up_as_its_rows_do() -> None:
    card = load_scorecard()
    summary = card.summary()
    judged = [r for r in card.rows if r.met is not None and ":" not in r.family]
    assert summary["cells"].sum() == len(judged) and summary["met"].sum() == sum(bool(r.met) for r in judged)
    assert summary["met"].dtype.kind == "i", "also where a metric has one cell"
    cells = [r.value for r in judged if (r.metric, r.n) == ("coverage_base", 40)]
    row = summary[(summary["metric"] == "coverage_base") & (summary["n"] == 40)].iloc[0]
    assert (row["smallest"], row["median"], row["largest"]) == (min(cells), np.median(cells), max(cells))


def test_scorecards_of_different_bases_pool_to_that_of_one_run(case: Case) -> None:
    provenance = {"version": "0", "redraws": 30, "population": 900, "others": 900, "draws": 1000, "nuisance": 0.5,
                  "doubt": 0.2, "seed": 0, "sizes": [60], "bases": ["one-0"], "pairs": 1}  # fmt: skip
    o = case.outcomes
    fields = ("curves", "decisions", "usable", "minimum_detectable", "onset", "onset_none")
    parts = [replace(case, outcomes=replace(o, **{name: getattr(o, name)[part] for name in fields}))
             for part in (slice(0, 25), slice(25, None))]  # fmt: skip
    first, second = (
        Scorecard(score([part]), {**provenance, "bases": [f"one-{i}"]}) for i, part in enumerate(parts)
    )
    pooled, whole = first.pooled(second), Scorecard(score(parts), provenance)
    # Cells of 25 and of 75 redraws: without one in common no row has more than that.
    apart = Scorecard(tuple(replace(row, architecture="other") for row in second.rows), second.provenance)
    assert (first.pooled(apart).provenance["redraws"], pooled.provenance["redraws"]) == (75, 100)
    assert len(pooled.rows) == len(whole.rows) > 10 and pooled.provenance["bases"] == ["one-0", "one-1"]
    for row, right in zip(pooled.rows, whole.rows, strict=True):
        assert (row.metric, row.target, row.met, row.redraws) == (
            right.metric,
            right.target,
            right.met,
            right.redraws,
        )
        numbers = [[getattr(r, name) for name in ("value", "lower", "upper")] for r in (row, right)]
        np.testing.assert_allclose(numbers[0], numbers[1], rtol=1e-6, atol=1e-9)
    # Verdicts that one card does not have at all were said in none of its redraws.
    verdicts = [
        Scorecard(
            (proportion_row("erased 0", "one", "valence", 40, f"verdict_{word}", np.ones(20)),),
            card.provenance,
        )
        for word, card in (("erased", first), ("inconclusive", second))
    ]
    said = {row.metric: (row.value, row.redraws) for row in verdicts[0].pooled(verdicts[1]).rows}
    assert said == {"verdict_erased": (0.5, 40), "verdict_inconclusive": (0.5, 40)}
    everything = Row("planted ≥ 0.5", "all", "", 60, "two_sided", 1.0, 0.9, 1.0, "≥ 0.95", True, 900)
    more = [replace(card, rows=(*card.rows, everything)) for card in (first, second)]
    assert more[0].pooled(more[1]).provenance["redraws"] == 100, "of all cells together"
    with pytest.raises(InputError, match="both scorecards measure one-0"):
        first.pooled(first)
    with pytest.raises(InputError, match="seed of the scorecards is 0 and 1"):
        first.pooled(replace(second, provenance={**second.provenance, "seed": 1}))
    uncounted = tuple(replace(row, redraws=0) for row in second.rows)
    with pytest.raises(InputError, match="does not say how many redraws"):
        first.pooled(replace(second, rows=uncounted))


def test_a_foreign_file_is_no_scorecard(tmp_path: Path) -> None:
    whole = json.loads((Path(calibration.__file__).parent / "data" / "scorecard.json").read_text())
    (tmp_path / "unsaid.json").write_text(json.dumps({**whole, "provenance": {"bases": []}}))
    with pytest.raises(InputError, match="provenance lacks doubt"):
        load_scorecard(tmp_path / "unsaid.json")
    with pytest.raises(InputError, match=r"no scorecard at .* \(Not a directory\)"):
        load_scorecard(tmp_path / "unsaid.json" / "below")
    (tmp_path / "attacks.json").write_text('[{"family": "of an older form"}]')
    with pytest.raises(InputError, match="is damaged"):
        calibration._read_rows(tmp_path / "attacks.json")
    with pytest.raises(InputError, match="no scorecard at"):
        load_scorecard(tmp_path / "scorecard.json")
    row = asdict(load_scorecard().rows[0])
    wordy = {"schema_version": 1, "provenance": {}, "rows": [{**row, "value": "high"}]}
    for text in ("[]", json.dumps(wordy)):
        (tmp_path / "scorecard.json").write_text(text)
        with pytest.raises(InputError, match="is no scorecard"):
            load_scorecard(tmp_path)


def test_a_scorecard_of_any_sizes_is_drawn() -> None:
    card = load_scorecard()
    sizes = (30, 40, 60, 100, 200)
    rows = [replace(row, n=n) for row in card.rows if row.metric == "bias" and row.n == 40 for n in sizes]
    for some in ((), tuple(rows)):
        figure = replace(card, rows=some).plot()
        assert len(figure.axes) == bool(some)
        named = [text.get_text() for text in figure.legends[0].get_texts()]
        assert [name for name in named if name.startswith("n =")] == [f"n = {n}" for n in sizes if some]


def test_every_family_has_its_place_in_the_full_run() -> None:
    families = {twin.family for twin in full_twins(["llama-0"])}
    # A shift of the template is an attack, on equal weights; scaled writes are for checkpoints of one's own.
    assert families == {*FAMILIES, *TRAINED, "dtype"} - {"template_shift", "scaled_writes"}


def test_an_interrupted_run_goes_on_and_another_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="empathy_probes")
    twins = (Twin("llama-0", "rotated"), Twin("llama-0", "identical"))
    options = Options(twins, sizes=(40,), population=80, others=80, redraws=4)
    out = tmp_path / "card"
    real, made = calibration.population, []

    def counted(twin: Twin, *rest: object, **options: object) -> Population:
        if len(made) == 1 and not interrupted:
            raise KeyboardInterrupt
        made.append(twin.family)
        return real(twin, *rest, **options)  # type: ignore[arg-type]

    interrupted: list[bool] = []
    monkeypatch.setattr(calibration, "population", counted)
    with pytest.raises(KeyboardInterrupt):
        run_calibration(options, out, workers=1)
    interrupted.append(True)
    card = run_calibration(options, out, workers=1)
    assert made == ["rotated", "identical"]
    said = [line for line in caplog.messages if line.startswith("pair ")]
    assert said == ["pair 1 of 2 is done: llama-0_rotated", "pair 2 of 2 is done: llama-0_identical"]
    assert {row.family for row in card.rows if row.metric == "equivalent" and row.value == 1} == {
        "rotated",
        "identical",
    }
    with pytest.raises(InputError, match="other options"):
        run_calibration(replace(options, seed=1), out, workers=1)
    # Bases of one architecture share the redraws of a cell: parts of another number would be counted.
    both = {"llama-0": list_bases()["llama-0"], "llama-1": list_bases()["llama-0"]}
    monkeypatch.setattr(calibration, "list_bases", lambda phantoms=None: both)
    with pytest.raises(InputError, match="of other bases"):
        run_calibration(replace(options, twins=(*twins, Twin("llama-1", "rotated"))), out, workers=1)
    monkeypatch.setattr(calibration, "list_bases", list_bases)
    # More pairs are added to it.
    more = run_calibration(replace(options, twins=(*twins, Twin("llama-0", "rescaled"))), out, workers=1)
    assert made == ["rotated", "identical", "rescaled"]
    assert [row for row in more.rows if row.family != "rescaled"] == list(card.rows)
    # A base of the same name that was built anew has other weights.
    rebuilt = tmp_path / "built" / "llama-0"
    shutil.copytree(list_bases()["llama-0"], rebuilt)
    config = json.loads((rebuilt / "base" / "config.json").read_text())
    (rebuilt / "base" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    monkeypatch.setattr(calibration, "list_bases", lambda phantoms=None: {"llama-0": rebuilt})
    with pytest.raises(InputError, match="of other bases"):
        run_calibration(options, out, workers=1)
    monkeypatch.setattr(calibration, "list_bases", list_bases)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        run_calibration(options, tmp_path / "full", workers=1)
    assert json.loads((out / "parts" / "options.json").read_text())["options"]["redraws"] == 4
    (part,) = (out / "parts").glob("*identical_n*.safetensors")
    whole = part.read_bytes()
    part.write_bytes(whole[:-40])
    with pytest.raises(InputError, match=f"delete {re.escape(str(part))} and run the same command again"):
        run_calibration(options, out, workers=1)
    part.unlink()
    assert run_calibration(options, out, workers=1).rows == card.rows
    for damaged in ('{"dig', "{}"):
        (out / "parts" / "options.json").write_text(damaged)
        with pytest.raises(InputError, match=r"options.json' is damaged"):
            run_calibration(options, out, workers=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"redraws": 3}, "redraws got 3"), ({"workers": 0}, "workers got 0"), ({"seed": -1}, "seed got -1")],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        calibrate(tmp_path / "x", **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no phantom bases"):
        list_bases(tmp_path)
    with pytest.raises(InputError, match="no base 'llama-9', expected some of gpt2-0, llama-0"):
        calibrate(tmp_path / "x", bases=["llama-9"])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="cannot be written"):
        calibrate(tmp_path / "file" / "below", quick=True, workers=1)
    # What `phantom` wrote is no base, whatever its name.
    (tmp_path / "twin-a" / "base").mkdir(parents=True)
    with pytest.raises(InputError, match="no phantom bases"):
        list_bases(tmp_path)


def test_chosen_bases_are_measured_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[Options] = []

    def noted(options: Options, *rest: object, **named: object) -> Scorecard:
        asked.append(options)
        return load_scorecard()

    monkeypatch.setattr(calibration, "run_calibration", noted)
    for chosen in ([], ["--bases", "llama-0"], ["--quick", "--bases", "gpt2-0"]):
        assert cli.main(["calibrate", "--out", str(tmp_path), *chosen]) == 0
    assert [{twin.base for twin in options.twins} for options in asked] == [
        {"gpt2-0", "llama-0"}, {"llama-0"}, {"gpt2-0"}
    ]  # fmt: skip
    for name in ("llama-0", "llama-7"):
        shutil.copytree(list_bases()["llama-0"] / "base", tmp_path / "built" / name / "base")
    built = list_bases(tmp_path / "built")
    assert sorted(built) == ["gpt2-0", "llama-0", "llama-7"]
    assert built["llama-0"] == tmp_path / "built" / "llama-0", "built anew, it is the one that was asked for"
    calibrate(tmp_path, quick=True, phantoms=tmp_path / "built")
    assert {twin.base for twin in asked[-1].twins} == {"gpt2-0", "llama-0"}
    assert "has no part in it" in caplog.text
    calibrate(tmp_path, phantoms=tmp_path / "built", bases=["llama-7"])
    assert "base 'llama-7' has no trained twin 'continued'" in caplog.text
    assert {twin.family for twin in asked[-1].twins} == {
        twin.family for twin in full_twins(["llama-7"])
    } - set(TRAINED)


# ---------------------------------------------------------------- secondary measures


@pytest.fixture(scope="module")
def exhibit() -> Exhibit:
    """A concept of which half is left in the second model, and neutral texts."""
    rng = np.random.default_rng(3)
    concept = load_phantom_concepts(400, names=("valence",))[0][0]
    label = np.array([float(item.label) for item in concept.stimuli.items])
    noise = rng.standard_normal((2, 800, 1, 12))
    noise[1] = 0.9 * noise[0] + np.sqrt(0.19) * noise[1]
    noise[0, :, 0, 0] += 1.5 * label
    noise[1, :, 0, 0] += 0.75 * label
    neutral = rng.standard_normal((2, 2000, 1, 12))

    def acts(rows: np.ndarray, model: str) -> Activations:
        return Activations(rows.astype(np.float32), (0,), "resid_post", model, False)

    return Exhibit(concept, (acts(noise[0], "base"), acts(noise[1], "aligned")),
                   (acts(neutral[0], "base"), acts(neutral[1], "aligned")))  # fmt: skip


def test_secondary_measures_hold_their_truth_and_miss_another_one(exhibit: Exhibit) -> None:
    readings = read_redraws(exhibit, 60, 30)
    truth = dict(zip(MEASURES, readings.truth, strict=True))
    assert truth["d_prime", "base"] == pytest.approx(1.5, abs=0.15)
    assert truth["d_prime", "attenuation"] == pytest.approx(0.5, abs=0.08)
    assert truth["cosine", "aligned"] == pytest.approx(1, abs=0.05)
    moved = replace(readings, truth=readings.truth + 0.6)
    for measure in (
        ("auroc", "base"),
        ("bits", "difference"),
        ("d_prime", "base"),
        ("d_prime", "attenuation"),
    ):
        index = MEASURES.index(measure)
        assert proportions([readings], index).mean() > 0.8, measure
        assert proportions([moved], index).mean() < 0.2, measure
    index = MEASURES.index(("bits", "attenuation"))
    assert truth["bits", "attenuation"] == pytest.approx(1 - truth["bits", "aligned"] / truth["bits", "base"])
    assert proportions([readings], index).mean() > 0.8
    assert proportions([replace(readings, truth=readings.truth + 3)], index).mean() < 0.2
    with pytest.raises(InputError, match="too few to draw 300"):
        read_redraws(exhibit, 300, 2)


def test_an_interval_up_to_all_of_it_holds_all_of_it_also_of_a_finite_population() -> None:
    index = MEASURES.index(("d_prime", "attenuation"))
    values = np.full((2, len(MEASURES), 3), np.nan, np.float32)
    values[:, index] = [[0.8, 0.6, 1.0], [0.8, 0.6, 0.9]]
    readings = Readings(40, 80, np.ones(len(MEASURES)), values)
    assert readings.covers()[:, index].tolist() == [True, False]


def test_an_interval_as_narrow_as_rounding_is_no_evidence_unless_it_misses() -> None:
    index = MEASURES.index(("bits", "difference"))
    values = np.full((3, len(MEASURES), 3), np.nan, np.float32)
    values[:, index] = [[0, -2e-6, 2e-6], [0.1, 0.1 - 2e-6, 0.1 + 2e-6], [-0.1, -0.2, 0.2]]
    readings = Readings(40, 4000, np.zeros(len(MEASURES)), values)
    assert proportions([readings], index).tolist() == [0, 1]


def test_the_scorecard_has_rows_of_secondary_measures(tmp_path: Path) -> None:
    twin = Twin("llama-0", "planted", "valence", 3, 0.5)
    options = Options((twin,), sizes=(40,), population=80, others=80, redraws=22, measure_redraws=22)
    card = run_calibration(options, tmp_path / "card", workers=1)
    found = {row.metric: row for row in card.rows}
    assert found["coverage_auroc_base"].value > 0.7 and found["coverage_bits_base"].target == "0.92 to 0.98"


# ---------------------------------------------------------------- attacks and ablations


def test_attacks_are_made_once_for_every_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, population: Population, exhibit: Exhibit
) -> None:
    asked: list[tuple[str, str, str]] = []

    def shown(twin: Twin, *rest: object, frame: str = "") -> Population:
        asked.append((twin.base, twin.family, frame))
        return population

    monkeypatch.setattr(calibration, "population", shown)
    monkeypatch.setattr(calibration, "exhibit", lambda twin, *rest: exhibit)
    bases = ("llama-0", "llama-1", "gpt2-0")
    options = Options(tuple(Twin(base, "identical") for base in bases), attack_redraws=5)
    (tmp_path / "parts").mkdir()
    rows = calibration._attacked(options, tmp_path, None)
    firsts = ("llama-0", "gpt2-0")
    assert {(base, family) for base, family, _ in asked} == {
        (base, family) for base in firsts for family in ("planted", "identical", "rescaled")
    }
    assert [family for _, family, frame in asked if frame] == ["identical", "identical"]
    found = {(row.family, row.architecture, row.metric): row for row in rows}
    assert len(rows) == len(found) == 2 * 9 + 4
    told = found["attack: scenarios told five times, no cluster", "llama", "coverage_attenuation"]
    assert (told.n, told.redraws, told.concept) == (40, 5, "valence") and told.value < 1
    assert found["attack: shuffled labels", "gpt2", "false_alarm"].value == 0
    assert found["attack: another template frame", "gpt2", "false_alarm"].value == 1, "planted, in these"
    swaps = [
        found["attack: scenarios told five times, cluster given", a, "coverage_attenuation"]
        for a in ("llama", "gpt2")
    ]
    assert all(row.met is None for row in swaps), "five redraws are held against nothing"
    assert calibration._attacked(options, tmp_path, None) == rows and len(asked) == 6


def test_shuffled_labels_leave_nothing_to_decide(population: Population) -> None:
    assert (
        not shuffled_labels(population, 60, 25, 0).any() and len(shuffled_labels(population, 60, 25, 0)) == 25
    )
    assert np.isin(redraw(population, 60, 20).decisions, (1, 2)).any(), "while the labels themselves do"


def test_scenarios_told_five_times_need_their_cluster(exhibit: Exhibit) -> None:
    without, within = (told_often(exhibit, 40, 60, 0, clustered=c) for c in (False, True))
    assert without.mean() < 0.8 and within.mean() > 0.9
    # With half of the population: errors are smaller by the root of a half, and intervals are held as short as that.
    rows = [
        i
        for i, item in enumerate(exhibit.concept.stimuli.items)
        if item.scenario in exhibit.concept.stimuli.units[:80]
    ]
    few = replace(
        exhibit,
        concept=replace(exhibit.concept, stimuli=replace(exhibit.concept.stimuli, items=tuple(exhibit.concept.stimuli.items[i] for i in rows))),
        acts=tuple(replace(a, acts=a.acts[rows]) for a in exhibit.acts),
    )  # fmt: skip
    assert few.n == 80
    assert 0.88 < told_often(few, 40, 200, 1, clustered=True).mean() < 0.99


def test_a_keyword_is_read_by_the_floor_and_nothing_where_there_is_none() -> None:
    assert keyword_leak(60, 3, 0).all() and not keyword_leak(60, 3, 0, leaked=False).any()
    leaked, clean = keyword_rows(60, 3, 0)
    assert (leaked.value, clean.value, leaked.redraws, leaked.architecture) == (1, 0, 3, "texts alone")
    # The same draws in every card, and so no more of them in two.
    provenance = {
        name: 0 for name in ("version", "population", "others", "draws", "nuisance", "doubt", "seed", "sizes")
    }
    one, two = (
        Scorecard((leaked, clean), {**provenance, "redraws": 3, "bases": [base], "pairs": 1})
        for base in ("a-0", "b-0")
    )
    assert one.pooled(two).rows == one.rows


def test_a_study_of_which_a_model_has_not_read_all_texts_is_refused(exhibit: Exhibit) -> None:
    assert (
        missing_texts(exhibit, 40, 4, 0).all() and not missing_texts(exhibit, 40, 2, 0, missing=False).any()
    )


def test_equal_weights_that_read_other_texts_are_two_readings(exhibit: Exhibit) -> None:
    """As with the chat templates of two tokenizers on the same weights."""
    texts = 80
    stimuli = replace(exhibit.concept.stimuli, items=exhibit.concept.stimuli.items[:texts])
    few = [replace(acts, acts=acts.acts[:texts]) for acts in exhibit.acts]
    found = measure_concept(
        replace(exhibit.concept, stimuli=stimuli), "own", few, exhibit.neutral, np.zeros((1, texts)), 0, True, null_draws=1
    )  # fmt: skip
    assert not np.array_equal(few[0].acts, few[1].acts)
    assert not np.array_equal(found.scores[0], found.scores[1]) and not found.same_model


def test_only_matched_directions_tell_a_contrast_from_what_varies_most() -> None:
    isotropic, matched = null_rows(100, 0)
    assert isotropic.value > 0.9 and matched.lower <= 0.05 and matched.met


def test_the_cross_fitted_gap_overstates_attenuation(population: Population) -> None:
    """The reason why strength is a U-statistic."""
    sample, truth = population.samples[0], population.truth[0, 2, CURVES.index("attenuation")]
    errors = [
        gap_attenuation(sample, np.random.default_rng(r).choice(sample.n, 60, replace=False), 2, r)[0] - truth
        for r in range(60)
    ]
    assert np.mean(errors) > 0.03


def test_raw_units_call_a_change_of_scale_a_change_of_strength(population: Population) -> None:
    sample = population.samples[0]
    scaled = replace(sample, differences=sample.differences * np.array([1, 3], np.float32)[:, None, None, None],
                     squares=sample.squares * np.array([1, 9])[:, None, None])  # fmt: skip
    whole = Population(population.layers, (scaled, *population.samples[1:]))
    with_rms = redraw(whole, 60, 3).curves[:, 0, 0, CURVES.index("attenuation"), 0]
    without = redraw(in_raw_units(whole), 60, 3).curves[:, 0, 0, CURVES.index("attenuation"), 0]
    assert abs(with_rms).max() < 0.3 and without.max() < -1


def test_the_page_has_the_numbers_of_the_shipped_card(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every table that the script prints stands in docs/scorecard, and the files beside it are the shipped card's rows."""
    root = Path(__file__).parents[1]
    monkeypatch.setattr("sys.argv", ["scorecard_tables.py"])
    runpy.run_path(str(root / "scripts" / "scorecard_tables.py"), run_name="__main__")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    page = (root / "docs" / "scorecard" / "README.md").read_text(encoding="utf8").splitlines()
    assert len(printed) > 50 and not [line for line in printed if line not in page]
    whole = load_scorecard().to_frame()
    said = whole[whole["metric"].str.startswith(("says_", "verdict_"))]
    for frame, name in ((whole, "scorecard.csv"), (said, "rehearsals.csv")):
        table = pd.read_csv(root / "docs" / "scorecard" / name, keep_default_na=False)
        assert list(table["metric"]) == list(frame["metric"])
        for column in ("value", "lower", "upper"):
            np.testing.assert_allclose(table[column], frame[column], rtol=1e-5)
        for column in ("family", "architecture", "concept", "n", "target"):
            assert list(table[column]) == list(frame[column])
        assert list(table["met"].astype(str)) == ["" if met is None else str(met) for met in frame["met"]]
