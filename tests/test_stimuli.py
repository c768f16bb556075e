"""The stimuli file: what is accepted, and what is refused by file, line, field and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import rows

from empathy_probes.audit import shipped_concepts
from empathy_probes.concepts import (
    DIMENSIONS,
    MECHANISMS,
    SPEAKERS,
    Concept,
    list_concepts,
    load_concept,
    load_concept_file,
    load_neutral,
    load_targets,
    save_concept,
)
from empathy_probes.errors import InputError
from empathy_probes.stimuli import load_stimuli, stimuli_from_rows


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf8"
    )
    return path


def test_a_file_becomes_one_set_named_by_its_stem(tmp_path: Path) -> None:
    (found,) = load_stimuli(write(tmp_path / "colour.jsonl", rows(5)))
    assert (found.concept, found.kind, found.read_kind, found.n_scenarios) == ("colour", "binary", "last", 5)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_csv_and_parquet_with_the_same_columns_give_the_same_digest(tmp_path: Path, suffix: str) -> None:
    lines = [{**row, "read": {"span": "red" if row["label"] else "blue"}} for row in rows(5)]
    frame = pd.DataFrame([{**line, "read": json.dumps(line["read"])} for line in lines])
    path = tmp_path / f"colour.{suffix}"
    frame.to_csv(path, index=False) if suffix == "csv" else frame.to_parquet(path)
    (table,) = load_stimuli(path)
    (plain,) = load_stimuli(write(tmp_path / "colour.jsonl", lines))
    assert table.digest == plain.digest


def test_csv_keeps_every_cell_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "colour.csv").write_text('id,scenario,text,label\n001,07,"NA",1\n002,07,"two\nlines",0\n')
    (found,) = load_stimuli(tmp_path / "colour.csv")
    assert [(i.id, i.scenario, i.text, i.label) for i in found.items] == [
        ("001", "07", "NA", 1.0), ("002", "07", "two\nlines", 0.0),
    ]  # fmt: skip
    (tmp_path / "short.csv").write_text("id,scenario,text,label\n001,07\n")
    with pytest.raises(InputError, match="not as many cells"):
        load_stimuli(tmp_path / "short.csv")


def test_parquet_takes_nested_turns_and_readouts(tmp_path: Path) -> None:
    lines = []
    for row in rows(3):
        turns = [{"role": "user", "content": row.pop("text")}, {"role": "assistant", "content": "then"}]
        readout = {"answers": [[" good", " fine"], [" bad"]]}
        lines.append({**row, "messages": turns, "read": {"message": 0}, "readout": readout})
    pd.DataFrame(lines).to_parquet(tmp_path / "colour.parquet")
    (table,) = load_stimuli(tmp_path / "colour.parquet")
    (plain,) = load_stimuli(write(tmp_path / "colour.jsonl", lines))
    assert table.digest == plain.digest


def test_null_counts_as_absent(tmp_path: Path) -> None:
    (found,) = load_stimuli(
        write(tmp_path / "c.jsonl", [{**row, "frame": None, "read": None} for row in rows(3)])
    )
    assert found.read_kind == "last"


def test_lines_that_name_a_concept_are_grouped_by_it(tmp_path: Path) -> None:
    lines = [{**row, "concept": c} for c in ("one", "two") for row in rows(4, concept=c)]
    assert [s.concept for s in load_stimuli(write(tmp_path / "both.jsonl", lines))] == ["one", "two"]


def test_labels_decide_the_kind() -> None:
    graded = [{**row, "label": row["label"] + i % 4 // 2} for i, row in enumerate(rows(4))]
    named = [{**row, "label": "red" if row["label"] else "blue"} for row in rows(3)]
    assert stimuli_from_rows(graded, "c").kind == "graded"
    assert stimuli_from_rows(named, "c").kind == "categorical"


@pytest.mark.parametrize("pair", [(-1, 1), (1, 2), (0, 2)])
def test_two_numbers_are_the_labels_0_and_1(pair: tuple[int, int]) -> None:
    """As grades they would have no AUROC, and half the strength or twice as much."""
    lines = [{**row, "label": pair[row["label"]]} for row in rows(3)]
    with pytest.raises(InputError, match=f"the labels are {pair[0]} and {pair[1]}, expected 0 and 1"):
        stimuli_from_rows(lines, "c")


def test_a_scenario_and_a_cluster_of_others_do_not_share_a_name() -> None:
    lines = rows(4)
    first = lines[0]["scenario"]
    for row in lines[2:]:
        row["cluster"] = first
    with pytest.raises(InputError, match="a cluster of other scenarios has its name"):
        stimuli_from_rows(lines, "c")
    for row in lines[:2]:
        row["cluster"] = first
    assert stimuli_from_rows(lines, "c").n_scenarios == 1


def test_clusters_are_the_unit() -> None:
    lines = [{**row, "cluster": row["scenario"][-1]} for row in rows(20)]
    assert stimuli_from_rows(lines, "c").n_scenarios == 10


@pytest.mark.parametrize("change", ["text", "label", "scenario", "read"])
def test_the_digest_changes_with_everything_that_can_change_a_number(change: str) -> None:
    lines = rows(4)
    before = stimuli_from_rows(lines, "c").digest
    if change == "text":
        lines[0]["text"] += " ."
    elif change == "label":
        lines[0]["label"], lines[1]["label"] = 0, 1
    elif change == "scenario":
        lines[0]["scenario"], lines[2]["scenario"] = lines[2]["scenario"], lines[0]["scenario"]
    else:
        lines = [{**row, "read": {"span": "red" if row["label"] else "blue"}} for row in lines]
    assert stimuli_from_rows(lines, "c").digest != before


GOOD = {"id": "a1", "scenario": "a", "text": "a red bird .", "label": 1}
PAIR = {"id": "a0", "scenario": "a", "text": "a blue bird .", "label": 0}
BAD: dict[str, tuple[list[Any], str]] = {
    "malformed line": ([GOOD, PAIR, "{"], "line 3 is not JSON"),
    "not an object": ([GOOD, "[1]"], "line 2 is a JSON list"),
    "missing field": ([GOOD, {k: v for k, v in PAIR.items() if k != "label"}], "line 2, field 'label'"),
    "unknown field": ([GOOD, {**PAIR, "colour": 1}], "line 2, field 'colour'"),
    "empty text": ([GOOD, {**PAIR, "text": " "}], "line 2, field 'text'"),
    "text and messages": ([GOOD, {**PAIR, "messages": [{"role": "user", "content": "x"}]}], "got 'both'"),
    "bad role": (
        [{**GOOD, "text": None} | {"messages": [{"role": "bot", "content": "x"}]}],
        "field 'messages'",
    ),
    "boolean label": ([GOOD, {**PAIR, "label": True}], "field 'label'"),
    "infinite label": ([GOOD, {**PAIR, "label": float("inf")}], "finite"),
    "mixed labels": ([GOOD, {**PAIR, "label": "no"}], "mixes strings and numbers"),
    "single class": ([GOOD, {**PAIR, "label": 1}], "every label is 1.0"),
    "one text": ([GOOD, PAIR, {**GOOD, "id": "b1", "scenario": "b"}], "scenario 'b'.*1 text"),
    "id twice": ([GOOD, {**PAIR, "id": "a1"}], "line 2, field 'id'.*line 1"),
    "span missing": ([{**GOOD, "read": {"span": "green"}}, PAIR], "occurs 0 times"),
    "span twice": ([{**GOOD, "read": {"span": "r"}}, PAIR], "occurs 2 times"),
    "two kinds of read": ([{**GOOD, "read": {"span": "red"}}, PAIR], "one kind per file"),
    "bad read": ([{**GOOD, "read": "first"}, PAIR], "field 'read'"),
    "message of a plain text": ([{**GOOD, "read": {"message": 0}}, PAIR], "field 'read'"),
    "bad readout": ([{**GOOD, "readout": {"answers": [["a"]]}}, PAIR], "field 'readout'"),
    "two clusters": ([{**GOOD, "cluster": "x"}, {**PAIR, "cluster": "y"}], "one cluster per scenario"),
    "empty file": ([], "holds no stimuli"),
    "path for a name": ([{**GOOD, "concept": "../up"}, {**PAIR, "concept": "../up"}], "field 'concept'"),
    "huge label": ([{**GOOD, "label": 10**400}, PAIR], "finite"),
    "deep": ([GOOD, "[" * 100_000], "line 2 is not JSON"),
    "half a surrogate": ([{**GOOD, "text": "\ud800 red"}, PAIR], "surrogate"),
    "common answer": ([{**GOOD, "readout": {"answers": [[" a"], [" a"]]}}, PAIR], "common answer"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_a_bad_file_is_one_sentence_that_names_place_and_remedy(tmp_path: Path, case: str) -> None:
    lines, expected = BAD[case]
    path = write(tmp_path / "bad.jsonl", lines)
    with pytest.raises(InputError, match=expected) as caught:
        load_stimuli(path)
    message = str(caught.value)
    assert "bad.jsonl" in message and "expected" in message and "\n" not in message


def test_a_file_that_is_missing_or_not_utf8_or_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes('{"id": "é"}'.encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        load_stimuli(tmp_path / "latin.jsonl")
    with pytest.raises(InputError, match="no stimuli file"):
        load_stimuli(tmp_path / "nothing.jsonl")
    with pytest.raises(InputError, match=r"suffix '\.txt'"):
        load_stimuli(write(tmp_path / "some.txt", []))


def test_an_unknown_concept_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown concept 'joy'.*valence"):
        load_concept("joy")


def test_a_file_of_ones_own_becomes_a_concept_of_the_role_asked_for(tmp_path: Path) -> None:
    (concept,) = load_concept_file(write(tmp_path / "colour.jsonl", rows(5)), "control")
    assert (concept.name, concept.role, concept.speaker) == ("colour", "control", "user")


def test_a_toml_beside_the_file_describes_it(tmp_path: Path) -> None:
    write(tmp_path / "colour.jsonl", rows(5))
    body = 'name = "colour"\nrole = "target"\nmechanism = ""\ndimension = ""\nspeaker = "third_person"\n'
    (tmp_path / "colour.toml").write_text(body + 'read = "last"\ndescription = "red or blue"\n')
    (concept,) = load_concept_file(tmp_path / "colour.jsonl")
    assert (concept.speaker, concept.description) == ("third_person", "red or blue")
    (tmp_path / "colour.toml").write_text(body + 'read = "span"\ndescription = "red or blue"\n')
    with pytest.raises(InputError, match="make them agree"):
        load_concept_file(tmp_path / "colour.jsonl")
    (tmp_path / "colour.toml").write_text(body + 'read = 5\ndescription = "x"\n')
    with pytest.raises(InputError, match="key 'read': got 5"):
        load_concept_file(tmp_path / "colour.jsonl")
    (tmp_path / "colour.toml").write_text('base = "a study file of the same stem"\n')
    assert load_concept_file(tmp_path / "colour.jsonl")[0].speaker == "user"
    (tmp_path / "colour.toml").write_text(body + 'read = "last"\ncolour = 1\n')
    with pytest.raises(InputError, match=r"missing keys \[description\], unknown keys \[colour\]"):
        load_concept_file(tmp_path / "colour.jsonl")


@pytest.mark.parametrize("name", list_concepts())
def test_a_shipped_concept_is_sound(name: str) -> None:
    concept = load_concept(name)
    assert concept.stimuli.n_scenarios >= 60 and concept.labels and concept.description
    texts = [item.text for item in concept.stimuli.items]
    assert len(set(texts)) == len(texts)
    if concept.role == "target":
        assert concept.mechanism and concept.dimension
    per_label: dict[str, list[int]] = {}
    for item in concept.stimuli.items:
        per_label.setdefault(str(item.label), []).append(len(item.text.split()))
    assert {len(lengths) for lengths in per_label.values()} == {concept.stimuli.n_scenarios}
    if name != "length":  # the one control that is about length
        means = np.array([np.mean(lengths) for lengths in per_label.values()])
        # The audit's bound (`audit.WORDS`), for every label against the middle of all.
        assert np.ptp(means) <= 0.5 if len(means) == 2 else abs(means - means.mean()).max() <= 0.5


def test_a_variant_is_its_original_asked_of_another_speaker() -> None:
    library = {c.name: c for c in shipped_concepts()}
    variants = [c for c in library.values() if c.variant_of]
    assert {c.speaker for c in variants} == set(SPEAKERS)
    for variant in variants:
        original = library[variant.variant_of]
        assert variant.name == f"{original.name}_{variant.speaker}" and not original.variant_of
        assert variant.speaker != original.speaker and set(variant.labels) == set(original.labels)
        for name in ("role", "mechanism", "dimension"):
            assert getattr(variant, name) == getattr(original, name)
        assert variant.stimuli.kind == original.stimuli.kind
    # A study of all targets asks each once.
    targets = {c.name for c in load_targets()}
    assert not {c.name for c in variants} & targets and len(targets) == 22


def test_the_library_covers_every_mechanism_and_dimension_and_most_of_it_can_be_asked() -> None:
    targets = [c for c in shipped_concepts() if c.role == "target"]
    assert {c.mechanism for c in targets} == set(MECHANISMS) and {c.dimension for c in targets} == set(
        DIMENSIONS
    )
    silent = [c.name for c in targets if any(item.readout is None for item in c.stimuli.items)]
    assert silent == ["emotion", "emotion_third_person"]  # eight categories have no two sides
    asked = [
        c for c in shipped_concepts() if c.role == "control" and all(item.readout for item in c.stimuli.items)
    ]
    assert len(asked) >= 6
    for concept in (*targets, *asked):
        by_scenario: dict[str, set[object]] = {}
        for item in concept.stimuli.items:
            by_scenario.setdefault(item.scenario, set()).add(item.readout)
        # The same question after both labels, or it would answer itself; several wordings, so that none decides alone.
        assert all(len(found) == 1 for found in by_scenario.values())
        assert concept.name in silent or len(set.union(*by_scenario.values())) >= 4


def test_no_text_recurs_in_another_concept_or_in_the_neutral_texts() -> None:
    seen: dict[str, str] = {text: "neutral" for text in load_neutral()}
    assert len(seen) >= 300
    for concept in shipped_concepts():
        for item in concept.stimuli.items:
            assert seen.setdefault(item.text, concept.name) == concept.name


def test_there_are_enough_shipped_controls_for_a_decision() -> None:
    assert sum(c.role == "control" for c in shipped_concepts()) >= 6


def test_a_concept_that_is_written_is_read_as_what_it_was(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": 'So \\ "so"\tsé .'}]
    extra = [
        {**row, "messages": turns, "read": {"message": 1}, "cluster": f"c{i // 4}",
         "readout": {"answers": [[" yes", " sure"], [" no"]]}} for i, row in enumerate(rows(8))
    ]  # fmt: skip
    for row in extra:
        del row["text"]
    own = Concept("own (1)", "target", "", "", "assistant", "Line\none", stimuli_from_rows(extra, "own (1)"))
    for concept in (*shipped_concepts(), own):
        (found,) = load_concept_file(save_concept(concept, tmp_path), concept.role)
        assert found == concept
