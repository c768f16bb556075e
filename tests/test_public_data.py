"""Laws of `scripts/prepare_public_data.py`: formats on a few lines of our own, counts on the data where present."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from empathy_probes.stimuli import load_stimuli

ROOT = Path(__file__).resolve().parents[1]
DATA = (ROOT / "../shared/data").resolve()


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "prepare_public_data", ROOT / "scripts/prepare_public_data.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks its module up there
    spec.loader.exec_module(module)
    return module


script = load_script()
TARGETS = ("goemotions_valence", "sst2_valence", "politeness", "repe_valence", "repe_emotion")
CONTROLS = (*(f"goemotions_{control}" for control in script.CONTROLS), "politeness_link")
AMBIGUOUS = {"realization", "surprise", "curiosity", "confusion"}
EMOTIONS = [*sorted(script.POSITIVE | script.NEGATIVE | AMBIGUOUS), "neutral"]
# One line of our own for each property of the controls, and one that has none of them.
NEUTRAL = (
    "When does shop number {w} open?", "the {w} shop is near here", "There was an old {w} shop", "shop {w} has 3 doors",
    "Shops, {w} ones, are here", "[NAME] walks past the {w} shop", "Then your {w} shop is open", "Here is the {w} shop",
)  # fmt: skip
COLOURS = (
    "amber", "blue", "coral", "denim", "ebony", "fawn", "green", "hazel", "ivory", "jade", "khaki", "lilac",
)  # fmt: skip


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A small folder in the formats of the public data; every line is ours."""
    folder = tmp_path / "data"
    for name in ("goemotions", "sst2", "politeness", "repe_emotions"):
        write(folder / name / "SOURCE.txt", f"https://example.org/{name} commit 0123abc\nlicence: ours\n")
    write(folder / "goemotions/labels.txt", "\n".join(EMOTIONS) + "\n")
    ids = {name: number for number, name in enumerate(EMOTIONS)}
    lines = [f"{line.format(w=w)}\t{ids['neutral']}\tn{i}" for w in COLOURS for i, line in enumerate(NEUTRAL)]
    lines += [f'A "{w} cup pleased me\t{ids["joy"]},{ids["love"]}\tp' for w in COLOURS]
    lines += [f"A {w} cup annoyed me\t{ids['anger']}\tm" for w in COLOURS]
    lines += [f"Mixed {w} cup\t{ids['joy']},{ids['anger']}\tx" for w in COLOURS]
    write(folder / "goemotions/dev.tsv", "\n".join(lines[::2]) + "\n")
    write(folder / "goemotions/test.tsv", "\n".join(lines[1::2]) + "\n")
    rows = [
        f'{label},"A {kind}, {w} film"\n' for w in COLOURS for label, kind in ((0, "dull"), (1, "bright"))
    ]
    write(folder / "sst2/dev_binary_sent.csv", "label,sentence\n" + "".join(rows[:12]))
    write(folder / "sst2/test_binary_sent.csv", "label,sentence\n" + "".join(rows[12:]))
    requests = [f"{i},May I ask about {w}{' <url>' * (i % 2)}?,{i / 10}\n" for i, w in enumerate(COLOURS * 2)]
    requests = [line.replace("ask", "ask again", i >= len(COLOURS)) for i, line in enumerate(requests)]
    write(folder / "politeness/wikipedia.csv", "id,request,normalized_score\n" + "".join(requests))
    for emotion in script.SITUATIONS:
        texts = [f"You meet {emotion} in {w} clothes." for w in COLOURS]
        write(folder / f"repe_emotions/{emotion}.json", json.dumps(texts))
    return folder


def run(data: Path, out: Path, *more: str) -> int:
    code: int = script.main(["--data", str(data), "--out", str(out), *more])
    return code


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def check_file(path: Path) -> int:
    """The laws of one file; the number of its scenarios."""
    (stimuli,) = load_stimuli(path)
    rows = rows_of(path)
    assert all(list(row) == ["id", "scenario", "text", "label", "read", "frame"] for row in rows)
    assert all(row["read"] == {"span": row["text"]} for row in rows)
    texts = [row["text"].casefold() for row in rows]
    assert len(set(texts)) == len(texts)
    assert all(" ".join(row["text"].split()) == row["text"] for row in rows)
    labels = {row["label"] for row in rows}
    scenarios = defaultdict(list)
    for row in rows:
        scenarios[row["scenario"]].append(row)
    for members in scenarios.values():
        assert len(members) == len(labels) and {row["label"] for row in members} == labels
        words = [len(row["text"].split()) for row in members]
        assert min(words) >= 1 and max(words) <= script.MAX_WORDS
        assert max(words) - min(words) <= script.MAX_DIFFERENCE
    assert stimuli.n_scenarios == len(scenarios)
    return len(scenarios)


def test_every_file_is_a_stimuli_file_with_one_text_of_each_label_per_scenario(
    data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(data, out, "--scenarios", "3") == 0
    assert {path.name for path in out.iterdir()} == {f"{name}.jsonl" for name in TARGETS + CONTROLS} | {
        "SOURCES.txt"
    }
    assert all(check_file(path) == 3 for path in out.glob("*.jsonl"))
    assert load_stimuli(out / "repe_emotion.jsonl")[0].kind == "categorical"
    assert load_stimuli(out / "repe_valence.jsonl")[0].kind == "binary"


def test_labels_follow_the_source(data: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path / "out", "--scenarios", "4") == 0
    meaning: dict[str, Callable[[str], bool]] = {
        "goemotions_valence": lambda text: "pleased" in text,
        "sst2_valence": lambda text: "bright" in text,
        "politeness": lambda text: "again" in text,  # the later half of our rows has the higher scores
        "repe_valence": lambda text: "happiness" in text,
        "goemotions_question": lambda text: "?" in text,
        "goemotions_capital": lambda text: text[0].isupper(),
        "goemotions_tense": lambda text: "was" in text,
        "goemotions_digit": lambda text: "3" in text,
        "goemotions_comma": lambda text: "," in text,
        "goemotions_name": lambda text: "[NAME]" in text,
        "goemotions_second_person": lambda text: "your" in text,
        "politeness_link": lambda text: "<url>" in text,
    }
    for name, rule in meaning.items():
        for row in rows_of(tmp_path / "out" / f"{name}.jsonl"):
            assert row["label"] == int(rule(row["text"])), name
    assert all(row["label"] in row["text"] for row in rows_of(tmp_path / "out/repe_emotion.jsonl"))


def test_negative_situations_come_in_equal_shares(data: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path / "out", "--scenarios", "8") == 0
    negative = [
        row["text"].split()[2] for row in rows_of(tmp_path / "out/repe_valence.jsonl") if row["label"] == 0
    ]
    assert {emotion: negative.count(emotion) for emotion in set(negative)} == dict.fromkeys(
        script.NEGATIVE_SITUATIONS, 2
    )


def test_no_text_is_in_two_controls_of_one_source(data: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path / "out", "--scenarios", "4") == 0
    texts = [row["text"] for name in CONTROLS for row in rows_of(tmp_path / "out" / f"{name}.jsonl")]
    assert len(set(texts)) == len(texts)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_texts(data: Path, tmp_path: Path) -> None:
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert run(data, tmp_path / out, "--scenarios", "4", "--seed", seed) == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    name = "sst2_valence.jsonl"
    assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()


def test_no_more_scenarios_than_the_data_allow_and_the_number_is_said(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, tmp_path / "out", "--scenarios", "500") == 0
    assert all(check_file(path) < 500 for path in (tmp_path / "out").glob("*.jsonl"))
    n = check_file(tmp_path / "out/sst2_valence.jsonl")
    assert n == len(COLOURS)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("sst2_valence:"))
    assert f"n = {n} scenarios" in line and "500 wanted" in line


def test_sources_name_address_and_licence_of_every_file(data: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path / "out", "--scenarios", "2") == 0
    sources = (tmp_path / "out/SOURCES.txt").read_text(encoding="utf-8").split("\n\n")
    for name in TARGETS + CONTROLS:
        (part,) = [part for part in sources if part.startswith(f"{name}.jsonl\n")]
        assert "https://example.org/" in part and "licence: " in part


def test_texts_are_cleaned_and_repeated_disputed_empty_and_long_ones_dropped() -> None:
    rows = [
        ("  one\u00a0 two\u200b\t", 0), ("One two", 0), ("both", 0), ("Both", 1), (" \n", 1),
        ("w " * script.MAX_WORDS, 1), ("v " * (script.MAX_WORDS + 1), 1),
    ]  # fmt: skip
    assert script.group_texts(rows, (0, 1)) == {0: ["one two"], 1: [("w " * script.MAX_WORDS).strip()]}


def test_a_comment_of_both_polarities_or_with_a_neutral_label_beside_has_no_valence() -> None:
    assert script.polarity({"joy", "love"}) == "positive" and script.polarity({"grief"}) == "negative"
    assert script.polarity({"neutral"}) == "neutral"
    assert script.polarity({"joy", "anger"}) == script.polarity({"joy", "neutral"}) == "mixed"
    assert script.polarity({"surprise"}) == script.polarity({"joy", "confusion"}) == "mixed"
    assert len(script.POSITIVE | script.NEGATIVE) == 23 and not script.POSITIVE & script.NEGATIVE


def test_texts_that_differ_too_much_in_length_are_never_paired() -> None:
    groups = {0: ["a", "a b c d e f g h i"], 1: ["b b b b b b b b", "c c c c c"]}
    found = script.pair_by_length(groups, 5, script.generator(0, "x"))
    assert found == [{0: "a b c d e f g h i", 1: "b b b b b b b b"}]


@pytest.mark.parametrize("seed", range(8))
def test_a_text_is_paired_once_even_where_pairing_takes_several_rounds(seed: int) -> None:
    # One short partner for two short texts: the second of them must go without, whatever the order.
    groups = {0: ["a", "b", "c c c c c c c c c"], 1: ["d", "e e e e e", "f f f f f", "g g g g g"]}
    found = script.pair_by_length(groups, 2, script.generator(seed, "x"))
    assert [scenario[1] for scenario in found] == ["d"]


BREAKAGES: dict[str, Callable[[Path], object]] = {
    "SOURCE.txt": lambda data: (data / "sst2/SOURCE.txt").unlink(),
    "test.tsv": lambda data: (data / "goemotions/test.tsv").unlink(),
    "dev.tsv, line 1": lambda data: write(data / "goemotions/dev.tsv", "a comment\t99\tid\n"),
    "labels.txt": lambda data: write(data / "goemotions/labels.txt", "joy\n"),
    "dev_binary_sent.csv, line 2": lambda data: write(
        data / "sst2/dev_binary_sent.csv", "label,sentence\n2,x\n"
    ),
    "no column": lambda data: write(data / "sst2/dev_binary_sent.csv", "a,b\n2,x\n"),
    "another number": lambda data: write(data / "sst2/dev_binary_sent.csv", "label,sentence\n1\n"),
    "finite": lambda data: write(data / "politeness/wikipedia.csv", "request,normalized_score\nx,nan\n"),
    "anger.json": lambda data: write(data / "repe_emotions/anger.json", "[1"),
    "list of strings": lambda data: write(data / "repe_emotions/anger.json", '{"a": 1}'),
    "repe_valence": lambda data: write(data / "repe_emotions/happiness.json", "[]"),
    "UTF-8": lambda data: (data / "repe_emotions/anger.json").write_bytes(b'["\xff"]'),
}


@pytest.mark.parametrize("named", BREAKAGES)
def test_a_bad_folder_is_one_sentence_and_nothing_is_written(
    named: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    BREAKAGES[named](data)
    assert run(data, tmp_path / "out") == 2
    heard = capsys.readouterr()
    assert heard.out == "" and heard.err.count("\n") == 1 and named in heard.err
    assert not (tmp_path / "out").exists()


def test_a_missing_folder_and_an_unusable_out_are_one_sentence(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "nowhere", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()
    write(tmp_path / "taken", "a file")
    assert run(data, tmp_path / "taken", "--scenarios", "2") == 2
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize("option", [("--scenarios", "0"), ("--scenarios", "many"), ("--seed", "-1")])
def test_bad_options_exit_with_2_and_one_line(
    option: tuple[str, str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(data, tmp_path / "out", *option)
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_the_old_file_and_no_scrap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.write_all(tmp_path, {"a.jsonl": "old"})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script.os, "replace", full)
    with pytest.raises(script.DataError, match="No space left"):
        script.write_all(tmp_path, {"a.jsonl": "new"})
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.jsonl", "old")]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the public data are not at {DATA}")
def test_the_public_data_give_five_targets_and_eight_disjoint_controls(tmp_path: Path) -> None:
    assert run(DATA, tmp_path / "out") == 0
    counts = {path.stem: check_file(path) for path in (tmp_path / "out").glob("*.jsonl")}
    assert set(counts) == set(TARGETS + CONTROLS)
    assert all(counts[name] == 200 for name in TARGETS if name != "repe_emotion")
    assert min(counts.values()) >= 100  # six situations of one length are rarer than two
    texts = [row["text"] for name in CONTROLS for row in rows_of(tmp_path / "out" / f"{name}.jsonl")]
    assert len(set(texts)) == len(texts)


def test_texts_are_read_at_their_last_token_where_that_is_asked_for(data: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path / "out", "--read", "last") == 0
    for path in (tmp_path / "out").glob("*.jsonl"):
        assert load_stimuli(path)[0].read_kind == "last"
