"""The instrument on pairs of known truth: three planted blocks; how often intervals hold is `test_scorecard`."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from empathy_probes import cli, phantoms
from empathy_probes.attenuation import Finding, measure_attenuation
from empathy_probes.concepts import Concept, load_concept_file
from empathy_probes.errors import InputError
from empathy_probes.grammar import stimuli_rows
from empathy_probes.pairs import load_pair
from empathy_probes.phantoms import (
    SHIPPED,
    build_phantom,
    list_phantoms,
    load_phantom,
    load_phantom_concepts,
    phantom_truth,
    write_phantom,
)
from empathy_probes.planting import FAMILIES, TRAINED, list_bases, twin_checkpoints
from empathy_probes.stimuli import stimuli_from_rows

TWINS = tuple(name for name in list_phantoms() if name.startswith("planted-"))
SEEDS = (0,)
OTHERS = ("intensity", "distance")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("phantom-store"))


def some_concepts(seed: int) -> tuple[list[Concept], list[Concept]]:
    """Valence and two targets that nothing was done to, against six controls."""
    targets, controls = load_phantom_concepts(60, seed)
    return [t for t in targets if t.name in ("valence", *OTHERS)], list(controls[:6])


@pytest.fixture(scope="session")
def findings(store: str) -> dict[tuple[str, int], Finding]:
    """One study per twin and draw, at the planted block and the one before."""
    found = {}
    for twin in TWINS:
        pair, block = load_phantom(twin), phantom_truth(twin)["layer"]
        for seed in SEEDS:
            targets, controls = some_concepts(seed)
            found[twin, seed] = measure_attenuation(
                pair, targets, controls, template="raw", layers=(block - 1, block), store=store
            )
    return found


def test_three_blocks_are_planted() -> None:
    assert len({phantom_truth(twin)["layer"] for twin in TWINS}) >= 3
    assert all(phantom_truth(twin)["concept"] == "valence" for twin in TWINS)


def test_nothing_is_found_before_the_planted_block(findings: dict[tuple[str, int], Finding]) -> None:
    for (twin, _), finding in findings.items():
        frame = finding.to_frame()
        block = phantom_truth(twin)["layer"]
        before = frame[(frame.measure == "strength") & (frame.layer >= 0) & (frame.layer < block)]
        assert len(before)
        for column in (
            "difference",
            "attenuation",
            "attenuation_lower",
            "attenuation_upper",
            "band_lower",
            "band_upper",
        ):
            assert (before[column] == 0).all(), (twin, column)


def test_the_planted_size_is_covered_and_decided(findings: dict[tuple[str, int], Finding]) -> None:
    covered, decided, widths = [], [], []
    for (twin, _), finding in findings.items():
        truth = phantom_truth(twin)
        frame = finding.to_frame()
        row = frame[
            (frame.measure == "strength") & (frame.concept == "valence") & (frame.layer == truth["layer"])
        ].iloc[0]
        planted = truth["attenuation_by_layer"][str(truth["layer"])]
        covered.append(row.attenuation_lower <= planted <= row.attenuation_upper)
        widths.append((row.attenuation_upper - row.attenuation_lower) / 2)
        decided.append(row.decision == "attenuated")
    assert len(covered) == len(SEEDS) * len(TWINS) and all(covered) and all(decided) and max(widths) <= 0.15


def test_concepts_that_nothing_was_done_to_are_left_alone(findings: dict[tuple[str, int], Finding]) -> None:
    claims = []
    for finding in findings.values():
        frame = finding.to_frame()
        others = frame[(frame.measure == "strength") & frame.concept.isin(OTHERS)]
        claims += [
            bool(set(rows.decision) & {"attenuated", "amplified"})
            for _, rows in others.groupby("concept", sort=False)
        ]
    assert np.mean(claims) <= 0.05


def test_the_onset_set_holds_the_planted_block(findings: dict[tuple[str, int], Finding]) -> None:
    for (twin, _), finding in findings.items():
        onset = finding.onset_frame().set_index("concept").loc["valence"]
        assert onset.onset_lower <= phantom_truth(twin)["layer"] <= onset.onset_upper


@pytest.mark.parametrize("twin", TWINS)
def test_a_written_phantom_is_two_checkpoints_any_loader_opens(twin: str, tmp_path: Path) -> None:
    out = write_phantom(twin, tmp_path)
    truth = json.loads((out / "truth.json").read_text())
    states = [AutoModelForCausalLM.from_pretrained(out / side).state_dict() for side in ("base", "aligned")]
    changed = {name for name, tensor in states[0].items() if not tensor.equal(states[1][name])}
    assert changed and all(f".layers.{truth['layer']}." in name for name in changed)
    tokenizer = AutoTokenizer.from_pretrained(out / "aligned")
    assert tokenizer("My friend .")["input_ids"].count(tokenizer.bos_token_id) == 1


def test_an_unknown_phantom_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown phantom 'x'.*planted-valence"):
        load_phantom("x")


@pytest.mark.parametrize("twin", TWINS)
def test_a_twin_differs_from_its_base_in_the_planted_block_alone(twin: str) -> None:
    base, family, concept, layer, keep = SHIPPED[twin]
    one, other, _ = twin_checkpoints(list_bases()[base], family, concept, layer, keep)
    changed = {name for name in one.tensors if not torch.equal(one.tensors[name], other.tensors[name])}
    assert changed and all(name.startswith(f"model.layers.{layer}.mlp.") for name in changed)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_family_is_shipped_with_a_truth_from_four_thousand_fresh_scenarios(kind: str) -> None:
    for family in (*(set(FAMILIES) - {"scaled_writes"}), *TRAINED):
        truth = phantom_truth(f"{kind}-{family}")
        assert truth["family"] == family and truth["n_scenarios"] == 4000
        lost = np.array([v or 0.0 for v in truth["attenuation_by_layer"].values()])
        said = truth["coupling"]["aligned"] / truth["coupling"]["base"]
        if family in ("identical", "rotated", "rescaled", "template_shift"):
            assert abs(lost).max() < 1e-3 and abs(said - 1) < 1e-3
        elif family in ("unread", "unsaid"):
            assert abs(lost).max() < 0.1 and abs(said) < 0.15
        elif family in ("planted", "erased", "local", "rerouted"):
            assert abs(truth["keep_achieved"] - truth["keep_intended"]) < 0.1
            assert abs(said - 1) < 0.05 if family in ("local", "rerouted") else said < 0.4
        if family == "local":
            assert (truth["verdict"], truth["positions"], truth["read"]) == ("local", "read", "Reply")


def test_a_local_twin_is_weaker_where_it_is_read_and_says_as_much() -> None:
    """At the end of a text, where the answer is formed, nothing changes."""
    pair, truth = load_phantom("llama-local"), phantom_truth("llama-local")
    for read, lost in ((truth["read"], 1 - truth["keep_achieved"]), ("", 0.0)):
        (target,), controls = load_phantom_concepts(40, 4, names=("valence", "tense"), read=read)
        finding = measure_attenuation(
            pair, target, controls, template="raw", layers=(2, 3), store=f"memory://{read}"
        )
        rows = finding.to_frame().query("measure == 'strength' and concept == 'valence'").set_index("layer")
        assert rows.at[2, "attenuation"] == 0 and abs(rows.at[3, "attenuation"] - lost) < 0.03


def test_a_concept_read_where_the_answer_is_formed_cannot_be_local(tmp_path: Path) -> None:
    (concept,), _ = load_phantom_concepts(80, 5, names=("valence",))
    base = list_bases()["llama-0"] / "base"
    out = build_phantom(base, family="local", concept=concept, layer=3, others=[], out=tmp_path / "twin")
    truth = json.loads((out / "truth.json").read_text())
    assert truth["coupling"]["aligned"] < 0.5 * truth["coupling"]["base"] and truth["verdict"] == "erased"
    plain = replace(
        concept,
        stimuli=replace(
            concept.stimuli, items=tuple(replace(i, readout=None) for i in concept.stimuli.items)
        ),
    )
    out = build_phantom(base, family="local", concept=plain, layer=3, others=[], out=tmp_path / "silent")
    truth = json.loads((out / "truth.json").read_text())
    assert truth["verdict"] is None and "coupling" not in truth


def test_what_cannot_be_planted_is_refused_before_a_model_runs(tmp_path: Path) -> None:
    base = list_bases()["llama-0"] / "base"
    with pytest.raises(InputError, match="'emotion', whose labels are categorical, expected two labels"):
        build_phantom(base, family="planted", concept="emotion", out=tmp_path / "twin")
    with pytest.raises(InputError, match="no concept 'valense', expected some of valence"):
        load_phantom_concepts(10, names=("valense",))
    (tmp_path / "file").write_text("mine")
    for taken, message in (
        ("file", "is there already"), ("file/below", "cannot be written, expected a writable folder"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            build_phantom(base, family="identical", out=tmp_path / taken)


def test_a_phantom_can_be_written_into_the_folder_one_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_phantom("llama-rescaled", ".")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here"]
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == ["aligned", "base", "truth.json"]


def test_where_there_is_no_room_one_sentence_says_so_and_nothing_is_left(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits on file size are POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(
            InputError, match=r"twin cannot be written .*too large.* a writable place with room"
        ):
            write_phantom("gpt2-unread", tmp_path / "twin")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_written_twin_of_any_family_is_the_pair_that_was_measured(tmp_path: Path) -> None:
    out = write_phantom("gpt2-unread", tmp_path / "twin")
    pair, loaded = load_phantom("gpt2-unread"), load_pair(out / "base", out / "aligned", device="cpu")
    assert [m.weights for m in pair.models] == [m.weights for m in loaded.models]
    assert json.loads((out / "truth.json").read_text())["verdict"] == "encoded_unread"


def test_a_truth_that_cannot_be_measured_is_not_asserted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Labels by chance: the base carries nothing that could be planted away."""
    rows = stimuli_rows("tense", 80, 3, doubt=1.0)
    concept = Concept("chance", "target", "", "", "user", "", stimuli_from_rows(rows, "chance"))
    out = build_phantom(
        list_bases()["llama-0"] / "base", family="planted", concept=concept, layer=2, others=[], out=tmp_path / "twin"
    )  # fmt: skip
    truth = json.loads((out / "truth.json").read_text())
    assert truth["keep_achieved"] is None and truth["verdict"] is None
    assert "does not carry 'chance' detectably" in caplog.text


def test_the_truth_is_of_scenarios_that_the_edit_was_not_fitted_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, rows = list_bases()["llama-0"] / "base", stimuli_rows("valence", 80, 3)
    concept = Concept("valence", "target", "", "", "user", "", stimuli_from_rows(rows, "valence"))
    fitted: list[Concept] = []
    make = phantoms.make_twin

    def noted(*given: Any) -> Any:
        fitted.append(given[3])
        return make(*given)

    monkeypatch.setattr(phantoms, "make_twin", noted)
    out = build_phantom(base, family="planted", concept=concept, layer=2, others=[], out=tmp_path / "twin")
    truth = json.loads((out / "truth.json").read_text())
    assert (truth["n_scenarios_fitted"], truth["n_scenarios"]) == (40, 40)
    (fresh,) = load_concept_file(out / "valence.jsonl")
    assert not set(fresh.stimuli.units) & set(fitted[0].stimuli.units)
    assert {*fresh.stimuli.units, *fitted[0].stimuli.units} == set(concept.stimuli.units)
    low, high = truth["attenuation_interval_by_layer"]["2"]
    assert low < truth["attenuation_by_layer"]["2"] < high and truth["attenuation_interval_by_layer"][
        "1"
    ] == [0, 0]
    # What a study of these texts says is what the truth says.
    pair = load_pair(out / "base", out / "aligned", device="cpu")
    finding = measure_attenuation(pair, fresh, template="raw", layers=(2,), store=str(tmp_path / "store"))
    row = finding.to_frame().query("measure == 'strength' and layer == 2").iloc[0]
    assert [row.attenuation_lower, row.attenuation_upper] == pytest.approx([low, high], abs=1e-3)
    few = replace(concept, stimuli=concept.stimuli.of_units(concept.stimuli.units[:59]))
    with pytest.raises(InputError, match="has 59 scenarios, expected at least 60"):
        build_phantom(base, family="planted", concept=few, layer=2, others=[], out=tmp_path / "few")


def test_a_share_that_has_no_part_in_a_family_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, rows = list_bases()["llama-0"] / "base", stimuli_rows("valence", 80, 3)
    concept = Concept("valence", "target", "", "", "user", "", stimuli_from_rows(rows, "valence"))
    for keep in (None, 0.0, 0.5):
        out = build_phantom(
            base, family="erased", concept=concept, layer=2, keep=keep, others=[], out=tmp_path / f"{keep}"
        )
        assert json.loads((out / "truth.json").read_text())["keep_intended"] == 0
        assert ("keep got 0.5 and has no part in 'erased'" in caplog.text) == (keep == 0.5)


@pytest.mark.parametrize(
    ("family", "truth", "expected"),
    [
        ("planted", {"concept": "valence", "n_scenarios_fitted": 40}, "--stimuli 'a b/valence.jsonl'"),
        ("unsaid", {"concept": "valence", "n_scenarios_fitted": 40},
         "--stimuli 'a b/valence.jsonl' --stages encode,use,express"),
        ("identical", {"concept": None}, "--concepts valence --allow-identical"),
        ("rotated", {"concept": None}, "--concepts valence"),
    ],
)  # fmt: skip
def test_the_command_to_try_finds_what_the_family_plants(
    family: str, truth: dict[str, Any], expected: str
) -> None:
    args = argparse.Namespace(family=family, stimuli=None, concept="valence")
    said = cli._trial(args, Path("a b"), truth)
    assert said == f"empathy-probes compare 'a b/base' 'a b/aligned' {expected}"


def test_others_are_named_and_never_the_planted_concept(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = str(list_bases()["llama-0"] / "base")

    def run(name: str, *options: str) -> int:
        return cli.main(["phantom", base, "--out", str(tmp_path / name), "--json", *options])

    assert run("two", "--family", "identical", "--others", "tense,number") == 0
    assert list(json.loads(capsys.readouterr().out)["truth"]["other_concepts"]) == ["tense", "number"]
    assert run("none", "--family", "identical", "--others", "none") == 0
    assert json.loads(capsys.readouterr().out)["truth"]["other_concepts"] == {}
    for others, sentence in (
        ("valence", "others got 'valence'"),
        ("joy", "unknown concept 'joy'"),
        ("none,tense", "--others got none beside names"),
    ):
        assert run("x", "--family", "planted", "--concept", "valence", "--others", others) == 2
        assert sentence in capsys.readouterr().err and not (tmp_path / "x").exists()
