"""Whole studies on redraws: what they say of a planted twin, and what the scorecard makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from empathy_probes.calibration import _rehearsed
from empathy_probes.contrasts import LayerSet
from empathy_probes.errors import InputError
from empathy_probes.grammar import CONTROLS, neutral_texts
from empathy_probes.phantoms import load_phantom, load_phantom_concepts
from empathy_probes.populations import Options, Twin
from empathy_probes.rehearsals import (
    Rehearsal,
    expected_words,
    frontier_word,
    rehearsal_rows,
    rehearse,
    speak,
)
from empathy_probes.store import open_store


@pytest.fixture(scope="module")
def held() -> Rehearsal:
    ((target,), controls) = load_phantom_concepts(60, 3, names=("valence", *CONTROLS[:6]))
    pair = load_phantom("planted-valence")
    return rehearse(pair, target, controls, neutral_texts(100), open_store("memory://rehearsal"), (3,))


def test_redrawn_studies_say_what_was_planted(held: Rehearsal) -> None:
    spoken = speak(held, 30, 3)
    for question, word in expected_words("planted", 3).items():
        assert spoken[question] == (word,) * 3, question
    assert speak(held, 30, 3) == spoken


def test_more_than_half_of_the_scenarios_are_no_sample(held: Rehearsal) -> None:
    with pytest.raises(InputError, match="60 scenarios are too few to draw 31 from"):
        speak(held, 31, 2)


def test_rows_say_how_often_each_question_was_answered_rightly_and_what_the_verdicts_were() -> None:
    right = expected_words("unsaid", None)
    words = {question: [word] * 9 + ["something else"] for question, word in right.items()}
    rows = {row.metric: row for row in rehearsal_rows(("unsaid", "llama", "valence", 40), None, words)}
    assert {f"says_{question}" for question in right} | {
        "verdict_used_unsaid",
        "verdict_something else",
    } == set(rows)
    assert rows["says_use"].value == 0.9 and rows["says_use"].met
    assert rows["verdict_something else"].value == 0.1 and rows["verdict_something else"].met is None
    none = {question: ["something else"] * 40 for question in right}
    assert not any(
        row.met
        for row in rehearsal_rows(("unsaid", "llama", "", 40), None, none)
        if row.metric.startswith("says")
    )


@pytest.mark.parametrize(
    ("frontier", "word"),
    [
        (None, "nothing to repair"),
        (LayerSet((), True), "nowhere"),
        (LayerSet((3,), False), "at 3"),
        (LayerSet((2, 3), False), "at 2-3"),
        (LayerSet((-1, 4), True), "at -1-4 or nowhere"),
    ],
)
def test_a_frontier_in_a_word(frontier: LayerSet | None, word: str) -> None:
    assert frontier_word(frontier) == word


def test_rates_of_a_cell_pool_its_bases(tmp_path: Path) -> None:
    twins = tuple(Twin(base, "unsaid", "valence") for base in ("llama-0", "llama-1"))
    right = expected_words("unsaid", None)
    (tmp_path / "parts").mkdir()
    for twin, use in zip(twins, ("lost at head", "kept"), strict=True):
        words = {question: [word] * 10 for question, word in {**right, "use": use}.items()}
        (tmp_path / "parts" / f"{twin.key}_rehearsal.json").write_text(json.dumps({"40": words}))
    rows = {row.metric: row for row in _rehearsed(Options(twins, rehearsal_redraws=10), tmp_path)}
    assert rows["says_use"].value == 0.5 and rows["says_express"].value == 1 and rows["says_use"].n == 40
    assert _rehearsed(Options(twins), tmp_path) == []
