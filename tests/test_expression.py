"""Coupling: what a concept does to the answer, compared between two models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import rows, tiny_llama, word_tokenizer

from empathy_probes.concepts import Concept
from empathy_probes.design import Settings
from empathy_probes.errors import InputError
from empathy_probes.expression import COUPLING_COLUMNS, CoupledConcept, Coupling, measure_coupling
from empathy_probes.models import load_model
from empathy_probes.pairs import make_pair
from empathy_probes.phantoms import load_phantom, load_phantom_concepts
from empathy_probes.stimuli import stimuli_from_rows
from empathy_probes.store import load_record

ANSWERS = {"answers": [[" red", " green"], [" blue"]]}


def made(base: np.ndarray, aligned: np.ndarray, name: str = "demo", role: str = "target") -> CoupledConcept:
    n = len(base)
    coupling = np.stack([base, aligned])
    return CoupledConcept(
        name, role, "raw", tuple(f"{name}-{i}" for i in range(n)), coupling, (), np.zeros((2, 0))
    )


def drawn(keep: float, n: int = 60, seed: int = 0, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=n)
    base = 2 + shared + noise * generator.normal(size=n)
    return base, 2 * keep + keep * shared + noise * generator.normal(size=n)


def test_means_and_differences_are_paired_t_intervals() -> None:
    base, aligned = drawn(0.5)
    concept = made(base, aligned)
    assert concept.means.value[0] == pytest.approx(base.mean())
    paired = aligned - base
    reach = 2.0010 * paired.std(ddof=1) / np.sqrt(60)  # t(.975, 59)
    assert concept.difference.upper - concept.difference.value == pytest.approx(reach, rel=1e-3)


def test_attenuation_holds_the_truth_in_about_95_percent_of_samples() -> None:
    held = 0
    for seed in range(600):
        a = made(*drawn(0.3, n=40, seed=seed)).attenuation
        held += bool(a.lower <= 0.7 <= a.upper)
    assert 0.93 <= held / 600 <= 0.97  # ± 2.2 binomial standard errors of .95


def test_a_base_that_shows_nothing_leaves_attenuation_blank_and_nothing_decided() -> None:
    base, aligned = drawn(0.5)
    result = Coupling((made(base - base.mean(), aligned),))
    row = result.to_frame().iloc[0]
    assert np.isnan(row["attenuation"]) and row["decision"] == "" and "base_not_detected" in row["flags"]


def test_a_coupling_that_changed_its_sign_is_a_loss_beyond_all_and_says_so() -> None:
    base, aligned = drawn(0.5)
    row = Coupling((made(base, -aligned),)).to_frame().iloc[0]
    assert row["attenuation"] > 1 and row["decision"] == "attenuated" and "sign_reversed" in row["flags"]


def test_decisions_are_made_against_the_controls() -> None:
    controls = [made(*drawn(0.5, seed=s, noise=0.2), f"control-{s}", "control") for s in range(1, 9)]
    drifted = made(*drawn(0.5, noise=0.2), "drifted")
    lost = made(*drawn(0.1, seed=20, noise=0.2), "lost")
    frame = Coupling((drifted, lost, *controls)).to_frame().set_index("concept")
    assert list(frame.reset_index().columns) == COUPLING_COLUMNS
    assert frame.loc["lost", "decision"] == "attenuated" and frame.loc["lost", "specific"] > 0.6
    assert frame.loc["drifted", "decision"] in ("equivalent", "inconclusive")
    assert frame.loc["drifted", "attenuation"] == pytest.approx(0.5, abs=0.1)
    assert frame.loc["control-1", "decision"] == "attenuated" and np.isnan(frame.loc["control-1", "specific"])


def test_a_model_against_itself_is_exactly_nothing(tmp_path: Path) -> None:
    models = [load_model((tiny_llama(0), word_tokenizer()), device="cpu") for _ in range(2)]
    made_rows = [{**row, "readout": ANSWERS} for row in rows(30)]
    concept = Concept("demo", "target", "", "", "user", "", stimuli_from_rows(made_rows, "demo"))
    result = measure_coupling(
        make_pair(*models, allow_identical=True), concept, template="raw", store=str(tmp_path)
    )
    row = result.to_frame().iloc[0]
    assert (row[["difference", "difference_lower", "difference_upper"]] == 0).all()
    assert row["decision"] == "equivalent"


def test_readouts_become_scenario_couplings_whatever_the_order_of_lines(tmp_path: Path) -> None:
    models = [load_model((tiny_llama(seed), word_tokenizer()), device="cpu") for seed in (0, 1)]
    made_rows = [{**row, "readout": ANSWERS} for row in rows(30)]
    pair = make_pair(*models)

    def measured(lines: list[dict[str, object]]) -> CoupledConcept:
        concept = Concept("demo", "target", "", "", "user", "", stimuli_from_rows(lines, "demo"))
        return measure_coupling(pair, concept, template="raw", store=str(tmp_path)).concepts[0]

    straight, back = measured(made_rows), measured(made_rows[::-1])
    order = [back.units.index(unit) for unit in straight.units]
    np.testing.assert_allclose(straight.coupling, back.coupling[:, order], atol=1e-5)
    by_item = dict(zip(straight.items, straight.readouts[0], strict=True))
    assert straight.coupling[0, 0] == pytest.approx(by_item["demo-0-1"] - by_item["demo-0-0"])


def test_the_planted_loss_reaches_the_answer_and_other_concepts_keep_theirs(tmp_path: Path) -> None:
    pair = load_phantom("planted-valence")
    names = ("valence", "conflict", "tense", "number", "place", "weather", "transport", "season")
    targets, controls = load_phantom_concepts(30, names=names)
    result = measure_coupling(pair, targets, controls, template="raw", store=str(tmp_path))
    frame = result.to_frame().set_index("concept")
    assert frame.loc["valence", "decision"] == "attenuated" and 0.65 < frame.loc["valence", "specific"] < 0.85
    assert frame.loc["conflict", "decision"] == "equivalent"
    result.save(tmp_path / "c.safetensors")
    types = {cls.__name__: cls for cls in (Coupling, CoupledConcept, Settings)}
    assert load_record(tmp_path / "c.safetensors", types).to_frame().equals(result.to_frame())


def test_a_second_measurement_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = load_phantom("planted-valence")
    concept = load_phantom_concepts(30, names=("valence",))[0]
    first = measure_coupling(pair, concept, template="raw", store=str(tmp_path))
    monkeypatch.setattr("empathy_probes.expression.read_out", lambda *_: pytest.fail("ran again"))
    again = measure_coupling(pair, concept, template="raw", store=str(tmp_path))
    assert np.array_equal(first.concepts[0].coupling, again.concepts[0].coupling)


def test_concepts_without_a_readout_are_left_out_and_named(tmp_path: Path) -> None:
    models = [load_model((tiny_llama(seed), word_tokenizer()), device="cpu") for seed in (0, 1)]
    asked = Concept("asked", "target", "", "", "user", "",
                    stimuli_from_rows([{**row, "readout": ANSWERS} for row in rows(30, concept="asked")], "asked"))  # fmt: skip
    silent = Concept(
        "silent", "control", "", "", "user", "", stimuli_from_rows(rows(30, concept="silent"), "silent")
    )
    result = measure_coupling(make_pair(*models), asked, (silent,), template="raw", store=str(tmp_path))
    assert result.skipped == ("silent",) and [c.concept for c in result.concepts] == ["asked"]
    assert "no_controls" in result.to_frame()["flags"].iloc[0]
    with pytest.raises(InputError, match="no readout: none of the targets silent"):
        measure_coupling(
            make_pair(*models), replace(silent, role="target"), template="raw", store=str(tmp_path)
        )
