"""Stages of a study: which questions are asked, what keeps one from being asked, and what they say together."""

from __future__ import annotations

import json
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import rows, tiny_llama, word_tokenizer

from empathy_probes import (
    attribute,
    attribution_patch,
    cli,
    dose_response,
    measure_attenuation,
    measure_coupling,
    patch,
    stitch,
    transplant,
)
from empathy_probes.concepts import Concept
from empathy_probes.design import Design, Settings, design_study
from empathy_probes.errors import InputError, ProvenanceError
from empathy_probes.grammar import neutral_texts
from empathy_probes.models import load_model
from empathy_probes.pairs import ModelPair, make_pair
from empathy_probes.phantoms import load_phantom, load_phantom_concepts
from empathy_probes.report import render_report
from empathy_probes.sites import Site
from empathy_probes.stages import QUESTIONS, RESULTS, STAGES, check_stages, load_result, plan_questions
from empathy_probes.stimuli import ReadoutSpec, stimuli_from_rows
from empathy_probes.store import open_store
from empathy_probes.study import Study, load_study, run_study

ANSWERS = {"answers": [[" red", " green"], [" blue"]]}


def tiny_design(readout: bool, template: str = "raw") -> Design:
    pair = make_pair(*(load_model((tiny_llama(seed), word_tokenizer()), device="cpu") for seed in (0, 1)))
    made = [{**row, **({"readout": ANSWERS} if readout else {})} for row in rows(30)]
    concept = Concept("demo", "target", "", "", "user", "", stimuli_from_rows(made, "demo"))
    silent = Concept(
        "silent", "control", "", "", "user", "", stimuli_from_rows(rows(30, 1, "silent"), "silent")
    )
    return design_study(pair, (concept,), (silent,), template=template)


@pytest.fixture(scope="module")
def phantom_study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    names = ("valence", "conflict", "tense", "number", "place", "weather", "transport", "season")
    targets, controls = load_phantom_concepts(30, names=names)
    design = design_study(
        load_phantom("planted-valence"), targets, controls, template="raw", neutral=neutral_texts(100)
    )
    folder = tmp_path_factory.mktemp("study")
    return run_study(design, Settings(), folder / "out", stages=STAGES, store=str(folder / "store")), folder


def test_every_question_of_every_stage_has_its_table_and_the_verdict_is_the_planted_one(
    phantom_study: tuple[Study, Path],
) -> None:
    study, folder = phantom_study
    for question in QUESTIONS:
        assert (folder / "out" / f"{question.key}.csv").is_file()
        assert len(study.tables[question.key]) > 0
    ledger = study.tables["ledger"].set_index("concept")
    assert ledger.loc["valence", "verdict"] == "erased" and ledger.loc["valence", "use"] == "lost at 3"
    assert ledger.loc["conflict", "verdict"] == "preserved"
    assert (ledger.loc[ledger["role"] == "control", "verdict"] == "").all()


def test_a_saved_study_with_all_stages_is_the_same_study_with_the_same_report(
    phantom_study: tuple[Study, Path],
) -> None:
    study, folder = phantom_study
    again = load_study(folder / "out")
    assert again.digest == study.digest
    for name, table in study.tables.items():
        pd.testing.assert_frame_equal(table, again.tables[name])
        saved = pd.read_csv(folder / "out" / f"{name}.csv", keep_default_na=False, na_values=[""])
        assert list(saved.columns) == list(table.columns)
    text = render_report(study)
    assert text == render_report(again)
    assert "In which blocks is expression lost?" in text and "Does it reach the output?" in text


def test_interrupted_work_is_not_done_again(
    phantom_study: tuple[Study, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, folder = phantom_study
    for name in (
        "stitching._hybrids", "stitching.neutral_states", "expression.read_out", "patching.patched_readouts", "steering.respond",
        "attribution.attribute_design",
    ):  # fmt: skip
        monkeypatch.setattr(f"empathy_probes.{name}", lambda *_: pytest.fail("ran again"))
    names = ("valence", "conflict", "tense", "number", "place", "weather", "transport", "season")
    targets, controls = load_phantom_concepts(30, names=names)
    design = design_study(
        load_phantom("planted-valence"), targets, controls, template="raw", neutral=neutral_texts(100)
    )
    other = run_study(design, Settings(), folder / "again", stages=STAGES, store=str(folder / "store"))
    assert other.tables["stitching"].equals(study.tables["stitching"])
    # Nor within a question: what single concepts gave is kept, only the answers as a whole are asked for anew.
    store = open_store(str(folder / "store"))
    monkeypatch.setattr("empathy_probes.attribution.attribute_design", lambda *_, **__: None)
    for question in QUESTIONS:
        if question.key not in ("attenuation", "attribution"):
            again = question.answer(design, Settings(), store)
            pd.testing.assert_frame_equal(again.to_frame(), study.result(question.key).to_frame())


def test_stages_are_known_and_encode_is_always_among_them() -> None:
    assert check_stages(["express"]) == ("encode", "express") and check_stages(STAGES) == STAGES
    with pytest.raises(InputError, match="unknown stage 'speak': expected one of encode, use, express"):
        check_stages(["speak"])


def test_without_a_readout_only_encode_is_asked_and_the_study_says_so() -> None:
    questions, notes = plan_questions(tiny_design(readout=False), STAGES)
    assert [q.key for q in questions] == ["attenuation"]
    assert "use and express were skipped" in notes[0] and "no readout" in notes[0]
    questions, notes = plan_questions(tiny_design(readout=True), STAGES)
    assert {q.key for q in questions} == {q.key for q in QUESTIONS}
    assert notes == ("Without a readout, and so in no stage but encode: silent.",)


def test_a_model_that_cannot_be_continued_is_refused_before_anything_runs() -> None:
    design = tiny_design(readout=True)
    design.pair.aligned.__dict__["replay_refusal"] = "it scales its logits"
    with pytest.raises(InputError, match="it scales its logits"):
        plan_questions(design, STAGES)
    assert [q.key for q in plan_questions(design, ["express"])[0]] == ["attenuation", "coupling"]


def test_results_of_other_models_make_no_study(phantom_study: tuple[Study, Path]) -> None:
    study, _ = phantom_study
    coupling = study.result("coupling")
    foreign = replace(coupling, provenance={**coupling.provenance, "base": {"weights": "0"}})
    with pytest.raises(ProvenanceError, match="different pairs of models"):
        Study("mixed", (study.finding, foreign))
    with pytest.raises(InputError, match="expected attenuation among them"):
        Study("alone", (coupling,))


@pytest.fixture(scope="module")
def notebook() -> tuple[ModelPair, list[Any]]:
    """What a notebook measures, one verb after another."""
    design = tiny_design(readout=True)
    pair, concept = design.pair, design.concepts[0]
    store: Any = {"template": "raw", "store": "memory://notebook"}
    few: Any = {"sites": [Site(1), Site(3)], "positions": ["last", "span"], "direction": "denoise"}
    return pair, [
        measure_attenuation(pair, concept, **store),
        measure_coupling(pair, concept, **store),
        patch(pair.aligned, concept, **few),
        attribution_patch(pair.aligned, concept, top=2, sample=1, **few),
        transplant(pair, concept, **store),
        stitch(pair, concept, **store),
        dose_response(pair, concept, layers=(1,), doses=(-0.1, 0.0, 0.1), **store),
        attribute(pair, concept, total_effects=False, **store),
    ]


def test_a_study_of_every_result_that_a_notebook_measures_is_saved_loaded_and_reported(
    notebook: tuple[ModelPair, list[Any]], tmp_path: Path
) -> None:
    _, results = notebook
    assert {type(result) for result in results} == set(RESULTS)
    study = Study("by hand", results)
    study.save(tmp_path / "study")
    again = load_study(tmp_path / "study")
    assert [r.key for r in again.results] == [r.key for r in results]
    for result in results:
        result.save(tmp_path / "one.safetensors")
        loaded = load_result(tmp_path / "one.safetensors")
        assert type(loaded) is type(result)
        pd.testing.assert_frame_equal(loaded.to_frame(), result.to_frame())
    assert render_report(again) == render_report(study)
    assert cli.main(["report", str(tmp_path / "study")]) == 0
    page = (tmp_path / "study" / "report.html").read_text(encoding="utf8")
    for figure in ("transplant", "attribution-patching", "patching"):
        assert 'src="data:image' in page.split(f'id="stage-{figure}"')[1].split("</section>")[0]


def test_the_report_shows_what_no_column_holds(notebook: tuple[ModelPair, list[Any]]) -> None:
    _, results = notebook
    study = Study("by hand", results)
    page = render_report(study)

    def section(key: str) -> str:
        return unescape(page.split(f'id="stage-{key}"')[1].split("</section>")[0])

    for heading in ("ed50", "tolerated", "controls", "random", "p shuffled"):
        assert f'<button type="button">{heading}</button>' in section("gain")
    assert '<button type="button">frontier</button>' in section("transplant")
    lens = study.result("attribution").concepts[0].lens[1]
    assert f"{lens.up[0]!r} {lens.up_logits[0]:+.2f}" in section("attribution")
    assert f"{lens.down[0]!r} {lens.down_logits[0]:+.2f}" in section("attribution")
    m = study.finding.measurements[0]
    error = m.views.map_error[m.layers.index(study.manifest["headlines"][0]["layer"])]
    assert f"it was not fitted on, the map misses {100 * error:.0f} % of the variance" in page
    assert study.tables["gain"].attrs["control_gains"] == results[-2].to_frame().attrs["control_gains"]


def test_a_study_takes_pairs_of_texts_beside_its_concepts(
    notebook: tuple[ModelPair, list[Any]], tmp_path: Path
) -> None:
    pair, results = notebook
    effect = patch(
        pair.aligned, [("the red dog .", "the blue dog ."), ("a red boat", "a blue boat")],
        readout=ReadoutSpec("answers", (" red",), (" blue",)), sites=[Site(1)],
    )  # fmt: skip
    study = Study("by hand", [results[0], effect])
    study.save(tmp_path / "study")
    assert "pairs" in render_report(load_study(tmp_path / "study"))


def test_a_study_refuses_what_it_could_not_hold(notebook: tuple[ModelPair, list[Any]]) -> None:
    _, results = notebook
    for other in (results[0].measurements[0], 3):
        with pytest.raises(
            InputError, match=r"a study got a (Measurement|int), expected results of the kinds Finding"
        ):
            Study("no", [results[0], other])
    elsewhere = load_model((tiny_llama(5), word_tokenizer()), device="cpu")
    effect = patch(elsewhere, tiny_design(readout=True).concepts[0], sites=[Site(1)])
    with pytest.raises(ProvenanceError, match="different pairs of models"):
        Study("no", [results[0], effect])


def test_results_of_other_texts_make_no_study(notebook: tuple[ModelPair, list[Any]]) -> None:
    pair, results = notebook
    other = [{**row, "readout": ANSWERS} for row in rows(40, 7)]
    concept = Concept("demo", "target", "", "", "user", "", stimuli_from_rows(other, "demo"))
    coupling = measure_coupling(pair, concept, template="raw", store="memory://notebook")
    with pytest.raises(ProvenanceError, match=r"'demo' has other texts in coupling .* than in attenuation"):
        Study("mixed", [results[0], coupling])


# ---------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 0), ("aligned", 1)):
        tiny_llama(seed).save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    lines = [{**row, "readout": ANSWERS} for row in rows(30, concept="mine")]
    (folder / "mine.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (folder / "bare.jsonl").write_text("\n".join(json.dumps(line) for line in rows(30, concept="bare")))
    return folder


def compare(folders: Path, out: Path, *more: str) -> int:
    stimuli = (
        ["--stimuli", str(folders / "bare.jsonl")]
        if "--bare" in more
        else ["--stimuli", str(folders / "mine.jsonl")]
    )
    rest = [word for word in more if word != "--bare"]
    return cli.main(
        ["compare", str(folders / "base"), str(folders / "aligned"), *stimuli, "--template", "raw", "--device", "cpu",
         "--store", str(folders / "store"), "--out", str(out), *rest]
    )  # fmt: skip


def test_compare_writes_the_tables_of_the_stages_asked_for(folders: Path, tmp_path: Path) -> None:
    assert compare(folders, tmp_path / "one", "--stages", "encode,express") == 0
    assert (tmp_path / "one" / "coupling.csv").is_file() and not (tmp_path / "one" / "stitching.csv").exists()
    ledger = pd.read_csv(tmp_path / "one" / "ledger.csv")
    assert ledger["use"].tolist() == ["not_run"] and ledger["express"].tolist() != ["not_run"]
    assert compare(folders, tmp_path / "one", "--stages", "encode,use,express") == 2  # another study is there


def test_a_readout_file_asks_for_all_or_for_each_by_name(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "all.json").write_text(json.dumps(ANSWERS))
    (tmp_path / "named.json").write_text(json.dumps({"bare": ANSWERS}))
    (tmp_path / "wrong.json").write_text(json.dumps({"other": ANSWERS}))
    for name in ("all", "named"):
        options = ("--bare", "--stages", "encode,express", "--readout", str(tmp_path / f"{name}.json"))
        assert compare(folders, tmp_path / name, *options) == 0
    tables = [pd.read_csv(tmp_path / name / "coupling.csv") for name in ("all", "named")]
    assert tables[0].equals(tables[1])
    assert (
        compare(folders, tmp_path / "x", "--stages", "express", "--readout", str(tmp_path / "wrong.json"))
        == 2
    )
    assert "names the concept 'other', expected some of mine" in capsys.readouterr().err
    assert compare(folders, tmp_path / "x", "--readout", str(tmp_path / "none.json")) == 2
    assert compare(folders, tmp_path / "x", "--stages", "speak") == 2
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_a_readout_that_cannot_be_asked_is_refused_before_anything_runs(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dry: tuple[str, ...]
) -> None:
    (tmp_path / "two.json").write_text(json.dumps({"answers": [[" red dog"], [" blue"]]}))
    options = ("--bare", "--stages", "use", "--readout", str(tmp_path / "two.json"), *dry)
    assert compare(folders, tmp_path / "out", *options, "--store", str(tmp_path / "store")) == 2
    assert "readout answer ' red dog' is 2 tokens" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "store").exists()


def test_a_study_file_names_stages_and_readout(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "ask.json").write_text(json.dumps(ANSWERS))
    (tmp_path / "study.toml").write_text(
        f'base = "{folders / "base"}"\naligned = "{folders / "aligned"}"\nstimuli = ["{folders / "bare.jsonl"}"]\n'
        'template = "raw"\nstages = ["encode", "express"]\nreadout = "ask.json"\ndevice = "cpu"\n'
    )
    assert cli.main(["run", str(tmp_path / "study.toml"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "coupling.csv").is_file()
