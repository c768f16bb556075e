"""The audit finds what is planted, passes what is clean, and holds over the whole shipped library."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_llama

from empathy_probes import cli
from empathy_probes.attenuation import measure_attenuation
from empathy_probes.audit import (
    CHECKS,
    Audit,
    Check,
    Cue,
    _tokenizer,
    audit_concept,
    audit_concepts,
    audit_library,
    reading_ease,
    shipped_concepts,
)
from empathy_probes.audit_tables import COLUMNS, describe_audit, docs_page, plain_audit
from empathy_probes.concepts import Concept, list_concepts, load_concept, load_concept_file
from empathy_probes.errors import InputError
from empathy_probes.models import load_model
from empathy_probes.pairs import make_pair
from empathy_probes.report import write_report
from empathy_probes.stimuli import stimuli_from_rows
from empathy_probes.store import load_record
from empathy_probes.study import Study

DOCS = Path(__file__).resolve().parent.parent / "docs" / "concepts.md"
SYLLABLES = ["ba", "do", "fi", "gu", "ke", "lo", "mi", "nu", "pa", "ro", "si", "tu", "ve", "wo", "za"]
Row = dict[str, Any]


def sentence(generator: np.random.Generator, n: int = 10) -> list[str]:
    """Words of no language, two or three syllables each, so that no two texts are alike."""
    return ["".join(generator.choice(SYLLABLES, 2 + i % 2)) for i in range(n)]


def clean(n: int = 40, name: str = "clean", seed: int = 0) -> list[Row]:
    """Labels that only the order of words tells: two words change places."""
    generator = np.random.default_rng([seed, *name.encode()])
    rows = []
    for s in range(n):
        words = sentence(generator)
        swapped = [words[1], words[0], *words[2:]]
        for label, said in ((1, words), (0, swapped)):
            rows.append({"id": f"{s}-{label}", "scenario": f"{name}-{s}", "text": " ".join(said), "label": label})  # fmt: skip
    return rows


def concept(rows: list[Row], name: str = "clean", **changes: Any) -> Concept:
    return replace(Concept(name, "target", "", "", "user", "", stimuli_from_rows(rows, name)), **changes)


def audited(rows: list[Row], *others: Concept) -> Audit:
    return audit_concept(concept(rows), others)


def missed(audit: Audit) -> set[str]:
    return {check.name for check in audit.checks if check.verdict != "ok"}


def edited(rows: list[Row], change: Callable[[Row, int], str]) -> list[Row]:
    """The same rows with other texts, each from its row and the number of its scenario."""
    return [row | {"text": change(row, int(row["scenario"].rpartition("-")[2]))} for row in rows]


# ---------------------------------------------------------------- the shipped library


@pytest.fixture(scope="session")
def library() -> tuple[Audit, ...]:
    """The audit of everything that is shipped, once."""
    return audit_library()


def test_every_shipped_concept_passes_or_says_why_not(library: tuple[Audit, ...]) -> None:
    assert [audit.concept for audit in library] == list(list_concepts())
    for audit in library:
        assert [check.name for check in audit.checks] == list(CHECKS)
        failed = {check.name: (check.value, check.found) for check in audit.checks if check.verdict == "fail"}
        assert not failed, audit.concept
        assert all(check.explanation for check in audit.checks if check.verdict == "explained")


def test_no_shipped_explanation_is_out_of_date(library: tuple[Audit, ...]) -> None:
    for audit, shipped in zip(library, shipped_concepts(), strict=True):
        for name in shipped.exceptions:
            check = audit.check(name)
            # A floor at its bound may fall on either side of it with another version of scikit-learn.
            near = check.unit == "AUROC" and check.value is not None and abs(check.value - check.bound) < 0.02
            assert check.verdict == "explained" or near, (audit.concept, name, check.value)


def test_valence_can_hardly_be_read_from_words(library: tuple[Audit, ...]) -> None:
    (valence,) = (audit for audit in library if audit.concept == "valence")
    assert valence.verdict == "ok"
    assert all(0.4 < (valence.check(f"floor_{kind}").value or 0) <= 0.65 for kind in ("words", "characters"))


def test_the_page_of_the_documentation_is_what_the_audit_writes(library: tuple[Audit, ...]) -> None:
    written, fresh = DOCS.read_text(encoding="utf8"), docs_page(library)
    number = re.compile(r"[-+]?\d+\.\d+")

    def rows(page: str) -> list[str]:
        lines = [line for line in page.splitlines() if line.startswith("| ")]
        return [number.sub("", line).replace(" *", "") for line in lines]

    remedy = "empathy-probes concepts audit --markdown > docs/concepts.md"
    assert rows(written) == rows(fresh), remedy
    tables = ([line for line in page.splitlines() if line.startswith("| ")] for page in (written, fresh))
    for old, new in zip(*tables, strict=True):
        # Another BLAS or scikit-learn may move the last digits.
        assert np.allclose([float(x) for x in number.findall(old)], [float(x) for x in number.findall(new)], atol=0.03), remedy  # fmt: skip
    assert all(check.explanation in written for audit in library for check in audit.checks)
    assert len(rows(written)) == len(library) + 5  # a head per mechanism and one for the controls


def test_the_tokenizer_of_the_length_check_comes_out_the_same_every_time() -> None:
    assert _tokenizer().get_vocab() == _tokenizer.__wrapped__().get_vocab()


# ---------------------------------------------------------------- leaks


def test_order_alone_passes_every_check_and_its_floor_is_chance() -> None:
    audit = audited(clean())
    assert audit.verdict == "ok" and not missed(audit)
    # The two texts of a scenario are one bag of words: their scores tie.
    assert audit.check("floor_words").value == 0.5
    assert audit.check("length_words").value == audit.check("length_tokens").value == 0


def leak(row: Row, scenario: int) -> str:
    """A word that stands in nearly every text of label 1 and in few of label 0."""
    word = "glad" if (row["label"] == 1) == (scenario % 10 > 0) else "zest"
    return f"{row['text']} {word}"


def test_a_planted_keyword_is_caught_and_named() -> None:
    audit = audited(edited(clean(), leak))
    assert missed(audit) == {"floor_words", "floor_characters"} and audit.verdict == "fail"
    floor = audit.check("floor_words")
    assert floor.value and floor.value > 0.8 and floor.lower and floor.lower > 0.6
    first = {cue.label: cue for cue in reversed(audit.cues)}
    assert (first["1"].word, first["1"].here, first["1"].there) == ("glad", 36, 4)
    assert (first["0"].word, first["0"].here, first["0"].there) == ("zest", 36, 4)


def test_the_reports_lexical_floor_catches_the_same_keyword(tmp_path: Path) -> None:
    from conftest import WORDS, word_tokenizer

    generator = np.random.default_rng(0)
    rows = []
    for s in range(30):  # words that the tiny model's tokenizer knows
        words = list(generator.choice(WORDS[:35], 8))
        for label, said in ((1, [*words[:3], "very", *words[3:]]), (0, [*words[:3], "quite", *words[3:]])):
            rows.append({"id": f"{s}-{label}", "scenario": f"s-{s}", "text": " ".join(said), "label": label})
    leaky = concept(rows, "leaky")
    assert audit_concept(leaky).check("floor_words").verdict == "fail"
    pair = make_pair(*(load_model((tiny_llama(seed), word_tokenizer()), device="cpu") for seed in (0, 1)))
    finding = measure_attenuation(
        pair, leaky, template="raw", layers=(0, 3), draws=99, store=str(tmp_path),
        neutral=[" ".join(generator.choice(WORDS, 8)) for _ in range(50)],
    )  # fmt: skip
    frame = finding.to_frame()
    floor = frame[(frame.site == "text") & (frame.measure == "auroc")]
    assert floor.base.item() > 0.95 and floor["flags"].item() == "lexical_floor"
    read = frame[(frame.site == "resid_post") & (frame.measure == "auroc")]
    assert read["flags"].str.contains("below_lexical_floor").any()
    page = write_report(Study("leak", [finding]), tmp_path / "report.html").read_text(encoding="utf8")
    card = page[page.index('id="concept-0-leaky"') : page.index('id="controls"')]
    assert "The probe does not beat a bag of words here" in card
    said = " ".join(re.sub("<[^>]*>", " ", card).split())
    assert f"AUROC of words alone (no model) {floor.base.item():.2f}" in said


def test_texts_of_one_label_that_are_a_word_longer_are_caught() -> None:
    longer = edited(clean(), lambda row, s: row["text"] + (" " + row["text"][:4] if row["label"] else ""))
    check = audited(longer).check("length_words")
    assert (check.value, check.lower, check.upper, check.verdict) == (1, 1, 1, "fail")
    assert {"length_words", "length_tokens"} <= missed(audited(longer))


def test_a_longer_text_for_every_other_scenario_cancels() -> None:
    either = edited(clean(), lambda row, s: row["text"] + (" " + row["text"][:4] if row["label"] == s % 2 else ""))  # fmt: skip
    check = audited(either).check("length_words")
    assert check.value == 0 and check.lower is not None and check.lower < 0


def test_reading_ease_is_fleschs_formula() -> None:
    # Six words, one sentence, six syllables; then eight words, two sentences, nine syllables.
    assert reading_ease("The cat sat on the mat.") == pytest.approx(206.835 - 1.015 * 6 - 84.6)
    assert reading_ease('The little cat sat. It didn\'t move, "ever."') == pytest.approx(
        206.835 - 1.015 * 4 - 84.6 * 10 / 8
    )
    assert reading_ease("Institutional considerations necessitate reorganisation.") < 0


def test_harder_words_on_one_side_are_caught() -> None:
    harder = edited(clean(), lambda row, s: row["text"] + (" ba" if row["label"] else " badofigukelomi"))
    audit = audited(harder)
    assert audit.check("reading").verdict == "fail" and (audit.check("reading").value or 0) > 10
    assert audit.check("length_words").value == 0


# ---------------------------------------------------------------- what recurs


def test_a_text_that_is_nearly_another_scenarios_is_caught_and_named() -> None:
    rows = clean()
    rows[2]["text"] = rows[0]["text"].rsplit(" ", 1)[0] + " pafuzi"
    check = audited(rows).check("duplicates")
    assert check.verdict == "fail" and check.value and 0.7 < check.value < 1
    assert "clean-0" in check.found or "clean-1" in check.found


def test_a_scenario_that_recurs_in_another_concept_is_caught_only_beside_it() -> None:
    rows, other = clean(), clean(name="other")
    other[4]["text"] = rows[10]["text"]
    beside = concept(other, "other")
    assert missed(audited(rows)) == set()
    audit = audited(rows, beside)
    assert missed(audit) == {"duplicates", "recurrence"}
    assert audit.check("recurrence").value == 1 and "other-2" in audit.check("recurrence").found
    assert missed(audit_concepts([concept(rows), beside])[1]) == {"duplicates", "recurrence"}


def test_a_concept_is_not_compared_with_another_version_of_itself() -> None:
    renamed = [row | {"scenario": f"again-{row['scenario']}"} for row in clean()]
    assert missed(audited(clean(), concept(renamed))) == set()
    assert "duplicates" in missed(audited(clean(), concept(renamed, "theirs")))


def test_a_text_of_the_neutral_ones_is_caught() -> None:
    from empathy_probes.concepts import load_neutral

    rows = clean()
    rows[0]["text"] = load_neutral()[7]
    assert {"duplicates", "recurrence"} <= missed(audited(rows))
    assert "neutral text 7" in audited(rows).check("duplicates").found


def test_a_sentence_that_recurs_is_counted_and_short_ones_are_not() -> None:
    generator = np.random.default_rng(5)
    long, short = " ".join(sentence(generator, 6)), " ".join(sentence(generator, 5))
    for said, n in ((long, 3), (short, 0)):
        rows = edited(clean(), lambda row, s, said=said: row["text"] + (f". {said.capitalize()}!" if s < 3 else ""))  # type: ignore[misc]  # fmt: skip
        assert audited(rows).check("recurrence").value == n


@pytest.mark.parametrize(("shared", "verdict"), [(4, "ok"), (5, "fail")])
def test_a_skeleton_may_stand_in_a_tenth_of_the_scenarios(shared: int, verdict: str) -> None:
    def framed(row: Row, scenario: int) -> str:
        words = row["text"].split()
        return " ".join([*words[:3], "today", "the", words[3], "gave", "me", *words[4:]] if scenario < shared else words)  # fmt: skip

    check = audited(edited(clean(), framed)).check("skeletons")
    assert check.verdict == verdict and check.value == shared / 40
    assert check.found == "'today the … gave me'"


# ---------------------------------------------------------------- labels of every kind


def graded(n: int = 40) -> list[Row]:
    return [row | {"id": f"{row['scenario']}-{grade}", "label": grade, "text": text}
            for row in clean(n) if row["label"] == 1
            for grade, text in ((3, row["text"]), (2, " ".join(sorted(row["text"].split()))),
                                (1, " ".join(row["text"].split()[::-1])))]  # fmt: skip


def test_grades_are_compared_at_their_ends() -> None:
    rows = graded()
    before = audited(rows)
    middle = [row | {"text": f"{row['text']} middling and long"} if row["label"] == 2 else row for row in rows]  # fmt: skip
    for name in ("length_words", "length_tokens", "reading", "floor_words", "floor_characters"):
        assert audited(middle).check(name) == before.check(name)
    assert "3 minus 1" in before.check("length_words").found and before.check("floor_words").value == 0.5
    leaky = [row | {"text": f"{row['text']} {'faint' if row['label'] == 1 else 'grave'}"} for row in rows]
    assert {"floor_words", "floor_characters"} <= missed(audited(leaky))
    assert audited(leaky).check("floor_words").value == 1


def test_a_rating_scale_needs_no_scenario_to_hold_every_grade_but_three_levels_do() -> None:
    scale = [row | {"label": row["label"] * (0.5 + i / 100)} for i, row in enumerate(clean())]
    assert audited(scale).check("labels").verdict == "ok"
    rows = graded()
    assert audited(rows[1:]).check("labels").value == 1
    assert audited(rows).check("labels").verdict == "ok"


def categorical(n: int = 40) -> list[Row]:
    """Three rotations of the same words: no bag of words tells them apart."""
    rows = []
    for row in clean(n):
        words = row["text"].split()
        if row["label"] == 1:
            rows += [row | {"id": f"{row['scenario']}-{name}", "label": name, "text": " ".join(words[i:] + words[:i])}
                     for i, name in enumerate(("joy", "fear", "pride"))]  # fmt: skip
    return rows


def test_categories_are_each_compared_with_the_rest_and_the_worst_is_named() -> None:
    rows = categorical()
    assert missed(audited(rows)) == set() and audited(rows).check("floor_words").value == 0.5
    longer = edited(rows, lambda row, s: row["text"] + (" ba do" if row["label"] == "joy" else ""))
    audit = audited(longer)
    assert (audit.check("length_words").value, audit.check("length_words").verdict) == (2, "fail")
    assert audit.check("length_words").found.startswith("joy minus the others")
    floor = audit.check("floor_words")
    assert floor.value and 0.75 < floor.value < 1 and "highest joy, 1.00" in floor.found
    assert {cue.word for cue in audit.cues if cue.label == "joy"} == {"ba", "do"}
    assert audited(rows[1:]).check("labels").verdict == "fail"


def test_turns_that_both_texts_share_tell_nothing() -> None:
    def chat(rows: list[Row], shared: bool) -> list[Row]:
        return [
            {k: v for k, v in row.items() if k != "text"}
            | {"read": {"message": 1}, "messages": [
                {"role": "user", "content": "I am so tired of the whole thing " + ("again" if shared or row["label"] else "today")},
                {"role": "assistant", "content": row["text"]}]}
            for row in rows
        ]  # fmt: skip

    plain = audited(clean())
    spoken = audited(chat(clean(), True))
    for name in ("length_words", "length_tokens", "floor_words", "floor_characters", "skeletons"):
        assert spoken.check(name) == plain.check(name)
    assert {"floor_words", "floor_characters"} <= missed(audited(chat(clean(), False)))


def test_the_order_of_the_texts_changes_nothing() -> None:
    rows = edited(clean(30), leak)
    shuffled = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    for a, b in zip(audited(rows).checks, audited(shuffled).checks, strict=True):
        assert a.verdict == b.verdict
        # Means summed in another order.
        assert a.value == pytest.approx(b.value, abs=1e-12) and a.lower == pytest.approx(b.lower, abs=1e-12)


def test_a_label_without_a_meaning_and_a_text_that_stands_twice_are_faults() -> None:
    assert missed(audit_concept(concept(clean(), labels={"1": "yes", "0": "no"}))) == set()
    check = audit_concept(concept(clean(), labels={"1": "yes"})).check("schema")
    assert check.verdict == "fail" and "labels 0, 1, but 1 are described" in check.found
    rows = clean()
    rows[1]["text"] = rows[0]["text"]
    assert audited(rows).check("schema").value == 1


def test_thirty_scenarios_are_enough_and_fewer_are_not() -> None:
    assert audited(clean(30)).check("size").verdict == "ok"
    assert audited(clean(29)).check("size").verdict == "fail"


# ---------------------------------------------------------------- readouts


def wordings(row: Row, scenario: int) -> list[str]:
    return [f" Word {scenario % 4} here.", f" Other {scenario % 4} here."]


READOUTS: dict[str, tuple[Callable[[Row, int], Any], str]] = {
    "four wordings": (lambda row, s: {"continuations": wordings(row, s)}, ""),
    "three wordings": (lambda row, s: {"continuations": wordings(row, s % 3)}, "3 wordings, expected four"),
    "asked by label": (
        lambda row, s: {"continuations": wordings(row, s + row["label"])}, "40 scenarios ask their texts differently",
    ),
    "two words longer": (
        lambda row, s: {"continuations": [wordings(row, s)[0] + " And more.", wordings(row, s)[1]]},
        "4 pairs of continuations differ",
    ),
    "one word longer": (
        lambda row, s: {"continuations": [wordings(row, s)[0] + " More.", wordings(row, s)[1]]}, "",
    ),
    "some silent": (lambda row, s: {"continuations": wordings(row, s)} if s else None, "2 texts have none"),
    "answers": (lambda row, s: {"answers": [[" good"], [" bad"]]}, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", READOUTS)
def test_a_readout_asks_both_labels_alike_in_several_wordings(case: str) -> None:
    make, fault = READOUTS[case]
    rows = clean()
    for i, row in enumerate(rows):
        spec = make(row, i // 2)
        if spec is not None:
            row["readout"] = spec
    check = audited(rows).check("readout")
    assert check.verdict == ("fail" if fault else "ok") and fault in check.found


def test_without_a_readout_there_is_nothing_to_measure() -> None:
    check = audited(clean()).check("readout")
    assert check.value is None and check.verdict == "ok" and "no readout" in check.found


# ---------------------------------------------------------------- exceptions and refusals


def test_an_explanation_in_the_toml_turns_a_failure_into_an_exception(tmp_path: Path) -> None:
    rows = edited(clean(), leak)
    path = tmp_path / "leaky.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf8")
    toml = (
        'name = "leaky"\nrole = "target"\nmechanism = ""\ndimension = ""\nspeaker = "user"\nread = "last"\ndescription = "x"\n'
        '[exceptions]\nfloor_words = """\nThe word\nis the label.\n"""\n'
    )
    path.with_suffix(".toml").write_text(toml)
    audit = audit_concept(load_concept_file(path)[0])
    assert {check.name: check.verdict for check in audit.checks if check.verdict != "ok"} == {
        "floor_words": "explained", "floor_characters": "fail",
    }  # fmt: skip
    assert audit.check("floor_words").explanation == "The word is the label."
    assert "because The word is the label." in describe_audit(audit)
    for broken in ("floor_words = ' '", "floor_words = 1"):
        path.with_suffix(".toml").write_text(toml.partition("[exceptions]")[0] + f"[exceptions]\n{broken}\n")
        with pytest.raises(InputError, match=r"exceptions.floor_words': got .* expected a sentence"):
            load_concept_file(path)


def test_what_cannot_be_audited_is_one_sentence() -> None:
    with pytest.raises(InputError, match="has 4 scenarios, expected at least 5"):
        audited(clean(4))
    with pytest.raises(InputError, match="explains the checks floor, expected names among schema"):
        audit_concept(concept(clean(), exceptions={"floor": "why not"}))
    with pytest.raises(InputError, match="'clean' was given twice"):
        audit_concepts([concept(clean()), concept(clean())])


def test_an_audit_is_a_frame_and_survives_being_saved(tmp_path: Path) -> None:
    audit = audited(edited(clean(), leak))
    frame = audit.to_frame()
    assert list(frame["name"]) == list(CHECKS) and set(frame.concept) == {"clean"}
    assert "floor_words" in audit._repr_html_()
    audit.save(tmp_path / "audit.safetensors")
    assert load_record(tmp_path / "audit.safetensors", {t.__name__: t for t in (Audit, Check, Cue)}) == audit
    assert json.loads(json.dumps(plain_audit(audit)))["verdict"] == "fail"


# ---------------------------------------------------------------- the command


def test_the_command_prints_a_block_per_concept_and_exits_with_3_where_one_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rows in (("clean", clean()), ("leaky", edited(clean(), leak))):
        text = "\n".join(json.dumps(row | {"id": f"{name}-{row['id']}"}) for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf8")
    assert cli.main(["concepts", "audit", str(tmp_path / "clean.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("clean: ok (target; 40 scenarios)\n")
    assert printed.count("\n") == 1 + len(CHECKS) + 2
    assert cli.main(["concepts", "audit", str(tmp_path / "leaky.jsonl"), "honorific", "--json"]) == 3
    leaky, shipped = json.loads(capsys.readouterr().out)
    assert (leaky["concept"], leaky["verdict"], shipped["verdict"]) == ("leaky", "fail", "ok")
    assert [check["name"] for check in leaky["checks"]] == list(CHECKS)
    # Two files of the same texts: each recurs in the other.
    both = [str(tmp_path / "clean.jsonl"), str(tmp_path / "leaky.jsonl")]
    assert cli.main(["concepts", "audit", *both]) == 3
    assert "fail       duplicates" in capsys.readouterr().out


def test_a_shipped_concept_is_audited_against_its_neighbours(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [vars(item) for item in load_concept("belief").stimuli.items]
    stolen = [{"id": r["id"], "scenario": r["scenario"], "text": r["text"], "label": r["label"]} for r in rows]  # fmt: skip
    audit = audit_concept(concept(stolen, "mine"), [load_concept("belief")])
    assert audit.check("recurrence").value == 64 and audit.check("duplicates").value == pytest.approx(1)


BAD = {
    "unknown name": (["audit", "joy"], "unknown concept 'joy'"),
    "no file": (["audit", "nowhere.jsonl"], "no stimuli file at nowhere.jsonl"),
    "another action": (["show"], "'show'"),
    "markdown of the list": (["--markdown"], "--markdown got no audit"),
    "markdown and JSON": (["audit", "--markdown", "--json"], "expected 'concepts audit --markdown'"),
    "one name twice": (["audit", "honorific", "honorific"], "given twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_2(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv, expected = BAD[case]
    assert cli.main(["concepts", *argv]) == 2
    heard = capsys.readouterr()
    assert heard.out == "" and heard.err.count("\n") == 1 and expected in heard.err


def test_columns_of_the_page_are_checks() -> None:
    assert set(COLUMNS) < set(CHECKS) and Check.__dataclass_fields__.keys() >= {"verdict", "value", "bound"}
