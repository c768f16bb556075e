"""Laws of the readers of public corpora: formats on a few lines of our own, counts on the data where present."""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import byte_tokenizer, shared

from empathy_probes import goemotions, pairing, public_data
from empathy_probes.concepts import load_concept_file
from empathy_probes.errors import InputError
from empathy_probes.prompts import render
from empathy_probes.specs import read_spec, resolve_concepts
from empathy_probes.stimuli import StimulusSet, load_stimuli, stimuli_from_rows

ROOT = Path(__file__).resolve().parents[1]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "prepare_public_data", ROOT / "scripts/prepare_public_data.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()
TARGETS = ("goemotions_valence", "sst2_valence", "politeness", "repe_valence", "repe_emotion")
CONTROLS = (*(f"goemotions_{control}" for control in goemotions.PROPERTIES), "politeness_link")
AMBIGUOUS = {"realization", "surprise", "curiosity", "confusion"}
EMOTIONS = [*sorted(goemotions.POSITIVE | goemotions.NEGATIVE | AMBIGUOUS), "neutral"]
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
    for emotion in public_data.SITUATIONS:
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
        assert min(words) >= 1 and max(words) <= pairing.MAX_WORDS
        assert max(words) - min(words) <= pairing.MAX_DIFFERENCE
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
        public_data.NEGATIVE_SITUATIONS, 2
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
        ("w " * pairing.MAX_WORDS, 1), ("v " * (pairing.MAX_WORDS + 1), 1),
    ]  # fmt: skip
    assert pairing.group_texts(rows, (0, 1)) == {0: ["one two"], 1: [("w " * pairing.MAX_WORDS).strip()]}


def test_a_comment_of_both_polarities_or_with_a_neutral_label_beside_has_no_valence() -> None:
    assert goemotions.polarity({"joy", "love"}) == "positive" and goemotions.polarity({"grief"}) == "negative"
    assert goemotions.polarity({"neutral"}) == "neutral"
    assert goemotions.polarity({"joy", "anger"}) == goemotions.polarity({"joy", "neutral"}) == "mixed"
    assert goemotions.polarity({"surprise"}) == goemotions.polarity({"joy", "confusion"}) == "mixed"
    assert len(goemotions.POSITIVE | goemotions.NEGATIVE) == 23
    assert not goemotions.POSITIVE & goemotions.NEGATIVE
    assert list(goemotions.EMOTIONS) == EMOTIONS  # the published order is the alphabet, neutral last


def test_texts_that_differ_too_much_in_length_are_never_paired() -> None:
    groups = {0: ["a", "a b c d e f g h i"], 1: ["b b b b b b b b", "c c c c c"]}
    found = pairing.pair_by_length(groups, 5, pairing.generator(0, "x"))
    assert found == [{0: "a b c d e f g h i", 1: "b b b b b b b b"}]


@pytest.mark.parametrize("seed", range(8))
def test_a_text_is_paired_once_even_where_pairing_takes_several_rounds(seed: int) -> None:
    # One short partner for two short texts: the second of them must go without, whatever the order.
    groups = {0: ["a", "b", "c c c c c c c c c"], 1: ["d", "e e e e e", "f f f f f", "g g g g g"]}
    found = pairing.pair_by_length(groups, 2, pairing.generator(seed, "x"))
    assert [scenario[1] for scenario in found] == ["d"]


BREAKAGES: dict[str, Callable[[Path], object]] = {
    "SOURCE.txt": lambda data: (data / "sst2/SOURCE.txt").unlink(),
    "*.tsv": lambda data: [path.unlink() for path in (data / "goemotions").glob("*.tsv")],
    "dev.tsv, line 1": lambda data: write(data / "goemotions/dev.tsv", "a comment\t99\tid\n"),
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


def test_the_public_data_give_five_targets_and_eight_disjoint_controls(tmp_path: Path) -> None:
    assert run(shared("data"), tmp_path / "out") == 0
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


# ---------------------------------------------------------------- formats without files of stimuli

CITIES = (
    "Oslo",
    "Lima",
    "Cairo",
    "Perth",
    "Turin",
    "Quito",
    "Delhi",
    "Accra",
    "Sofia",
    "Paris",
    "Tunis",
    "Leeds",
)


def emobank(folder: Path) -> None:
    lines = [
        f'id_{i},train,{1 + i / 10},{3 - i / 20},3.0{i % 10},"In {w} it is {city}, they said"'
        for i, (w, city) in enumerate((w, city) for w in COLOURS for city in CITIES[:3])
    ]
    write(folder / "emobank.csv", "id,split,V,A,D,text\n" + "\n".join(lines) + "\n")


def epitome(folder: Path) -> None:
    said = ("Try again, {w}", "Sorry dear {w}", "I feel for {w}")
    for mechanism in ("emotional-reactions", "explorations"):
        lines = [
            f'{i},r{i},"My {w} bird left, {level}","{text.format(w=w)}",{level},'
            for i, w in enumerate(COLOURS)
            for level, text in enumerate(said)
        ]
        header = "sp_id,rp_id,seeker_post,response_post,level,rationales\n"
        write(folder / f"{mechanism}-reddit.csv", header + "\n".join(lines) + "\n")


def esconv(folder: Path) -> None:
    def turn(text: str, strategy: str = "") -> dict[str, Any]:
        notes = {"annotation": {"strategy": strategy}} if strategy else {"annotation": {}}
        return {"speaker": "supporter" if strategy else "seeker", "content": text + "\n", **notes}

    talks = [
        {
            "emotion_type": "sadness",
            "dialog": [
                turn("Hello there", "Question"),  # answers nothing
                turn(f"My {w} cup broke"),
                turn("And I miss it"),
                turn(f"Buy another {w} cup", "Providing Suggestions"),
                turn(f"I once broke a {w} cup", "Self-disclosure"),
                turn(f"It was {w} and old"),
                turn(f"What {w} was it?", "Question"),
                turn(f"Dark {w}"),
                turn(f"Nice {w} day today", "Others"),
            ],
        }
        for w in COLOURS
    ]
    write(folder / "ESConv.json", json.dumps(talks))


def aipsy(folder: Path) -> None:
    lines = []
    for w in COLOURS:
        texts = {
            "grief": f"He folded her {w} coat and put it back.",
            "neutral": f"He folded the {w} map and went.",
        }
        ids = {"grief": f"B-{w}", "neutral": f"N-{w}"}
        for emotion, other in (("grief", "neutral"), ("neutral", "grief")):
            row = {"id": ids[emotion], "text": texts[emotion], "emotion": emotion}
            lines.append(row | {"stimulus_set": "B_clinical", "matched_control_id": ids[other]})
        unmatched = {
            "id": f"A-{w}",
            "text": f"I wept over {w}.",
            "emotion": "grief",
            "matched_control_id": None,
        }
        lines.append(unmatched)
    write(folder / "stimuli.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def hub_set(folder: Path) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["sad", "glad", "mad"])}
    )
    rows = [(f"A {w} day, {k}", k) for w in COLOURS for k in range(3)]
    made = datasets.Dataset.from_dict(
        {"text": [text for text, _ in rows], "label": [k for _, k in rows]}, features=features
    )
    made.save_to_disk(folder / "moods")


MAKERS: dict[str, Callable[[Path], None]] = {
    "emobank": emobank, "epitome": epitome, "esconv": esconv, "aipsy": aipsy, "datasets": hub_set,
}  # fmt: skip


@pytest.fixture
def corpora(data: Path) -> dict[str, Path]:
    """A path for every format there is; every line is ours."""
    for format, make in MAKERS.items():
        (data / format).mkdir()
        make(data / format)
    paths = {format: data / format.removesuffix("_controls") for format in public_data.FORMATS}
    return paths | {"datasets": data / "datasets/moods"}


@pytest.mark.parametrize("format", public_data.FORMATS)
@pytest.mark.parametrize("read", ["mean", "last"])
def test_every_format_gives_stimuli_that_can_be_rendered(
    format: str, read: str, corpora: dict[str, Path]
) -> None:
    found = load_stimuli(corpora[format], format, scenarios=5, read=read)
    assert found and len({stimuli.concept for stimuli in found}) == len(found)
    for stimuli in found:
        assert 1 <= stimuli.n_scenarios <= 5
        assert len(stimuli.items) % stimuli.n_scenarios == 0
        chat = bool(stimuli.items[0].messages)
        assert stimuli.read_kind == ("span" if read == "mean" else "message" if chat else "last")
        render(byte_tokenizer(), stimuli, "raw", public_data.FORMATS[format].speaker)


@pytest.mark.parametrize("format", public_data.FORMATS)
def test_a_seed_decides_which_texts_and_nothing_else_does(format: str, corpora: dict[str, Path]) -> None:
    first, again, other = (
        load_stimuli(corpora[format], format, scenarios=4, seed=seed) for seed in (0, 0, 1)
    )
    assert [s.digest for s in first] == [s.digest for s in again] != [s.digest for s in other]


def by_scenario(stimuli: StimulusSet) -> list[list[Any]]:
    found: dict[str, list[Any]] = defaultdict(list)
    for item in stimuli.items:
        found[item.scenario].append(item)
    return list(found.values())


def test_ratings_stay_grades_and_a_scenario_spans_the_scale(corpora: dict[str, Path]) -> None:
    found = {s.concept: s for s in load_stimuli(corpora["emobank"], "emobank", scenarios=6)}
    assert set(found) == {"emobank_valence", "emobank_arousal", "emobank_dominance"}
    assert all(s.kind == "graded" for s in found.values())
    # 36 ratings 1.0, 1.1 … 4.5: each third of them gives one text.
    for items in by_scenario(found["emobank_valence"]):
        low, middle, high = sorted(float(item.label) for item in items)
        assert low < 2.2 <= middle < 3.4 <= high
    texts = {item.text: item.label for item in found["emobank_valence"].items}
    assert texts and all(f"In {COLOURS[0]}" not in text or label <= 1.2 for text, label in texts.items())


def test_a_response_keeps_what_it_answers_and_its_level(corpora: dict[str, Path]) -> None:
    found = {s.concept: s for s in load_stimuli(corpora["epitome"], "epitome", scenarios=6)}
    assert set(found) == {"epitome_emotional_reactions", "epitome_explorations"}
    for items in by_scenario(found["epitome_explorations"]):
        assert [item.label for item in items] == [0.0, 1.0, 2.0]
        assert [item.text.split("\n")[1].split()[0] for item in items] == ["Try", "Sorry", "I"]
        assert all([turn.role for turn in item.messages] == ["user", "assistant"] for item in items)
        # The post that this response answers, and no other: both name the same colour.
        assert all(item.messages[0].content.split()[1] in item.messages[1].content for item in items)
    (alone,) = load_stimuli(corpora["epitome"] / "explorations-reddit.csv", "epitome", scenarios=6)
    assert alone.digest == found["epitome_explorations"].digest


def test_advice_is_told_from_exploring_and_follows_all_that_the_seeker_said(corpora: dict[str, Path]) -> None:
    (stimuli,) = load_stimuli(corpora["esconv"], "esconv")
    assert stimuli.n_scenarios == len(COLOURS)
    for item in stimuli.items:
        asked, answer = (turn.content for turn in item.messages)
        if item.label == 1:
            assert answer.startswith("Buy") and asked.endswith("broke And I miss it")
        else:
            assert answer.startswith("What") and asked.startswith("It was")


def test_vignettes_stand_beside_their_own_neutral_one(corpora: dict[str, Path]) -> None:
    (stimuli,) = load_stimuli(corpora["aipsy"], "aipsy")
    assert stimuli.n_scenarios == len(COLOURS)
    for neutral, affect in by_scenario(stimuli):
        assert (neutral.label, affect.label) == (0.0, 1.0)
        assert "map" in neutral.text and "coat" in affect.text
        assert set(COLOURS) & set(neutral.text.split()) == set(COLOURS) & set(affect.text.split())


def test_names_of_classes_are_categories_and_two_classes_are_a_contrast(
    corpora: dict[str, Path], tmp_path: Path
) -> None:
    import datasets

    (moods,) = load_stimuli(corpora["datasets"], "datasets", scenarios=5)
    assert (moods.concept, moods.kind) == ("moods", "categorical")
    assert {item.label for item in moods.items} == {"sad", "glad", "mad"}
    assert all(item.label == ("sad", "glad", "mad")[int(item.text[-1])] for item in moods.items)
    two = datasets.load_from_disk(str(corpora["datasets"])).filter(lambda row: row["label"] < 2)
    two.cast_column("label", datasets.ClassLabel(names=["sad", "glad"])).save_to_disk(tmp_path / "two")
    (binary,) = load_stimuli(tmp_path / "two", "datasets", scenarios=5)
    assert binary.kind == "binary" and all(int(item.text[-1]) == item.label for item in binary.items)


def test_a_data_set_of_the_hub_is_asked_for_by_name_revision_and_split(
    corpora: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load(name: str, revision: str | None, split: str) -> Any:
        asked.append((name, revision, split))
        return datasets.load_from_disk(str(corpora["datasets"]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    (one,) = load_stimuli("owner/mood.set@abc:test", "datasets", scenarios=3)
    load_stimuli("owner/moods", "datasets", scenarios=3)
    assert asked == [("owner/mood.set", "abc", "test"), ("owner/moods", None, "train")]
    assert one.concept == "mood.set"


def test_a_data_set_without_labels_or_columns_is_refused(tmp_path: Path) -> None:
    import datasets

    plain = datasets.Dataset.from_dict({"sentence": ["a"], "label": [1]})
    plain.save_to_disk(tmp_path / "plain")
    with pytest.raises(InputError, match="columns sentence, label, expected text among them"):
        load_stimuli(tmp_path / "plain", "datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    datasets.Dataset.from_dict({"text": ["x"], "label": [-1]}, features=features).save_to_disk(tmp_path / "u")
    with pytest.raises(InputError, match="label -1, expected a text and one label"):
        load_stimuli(tmp_path / "u", "datasets")


SPOILED: dict[str, tuple[str, str, str]] = {
    "emobank": ("emobank.csv", "id,split,V,A,D,text\na,b,x,2,3,t\n", "line 2: got V 'x'"),
    "epitome": ("x-reddit.csv", "seeker_post,response_post,level\na,b,3\n", "level '3'"),
    "esconv": ("ESConv.json", '[{"dialog": [{"content": "x"}]}]', "conversation 1"),
    "aipsy": ("stimuli.jsonl", '{"id": "a", "text": "t"}\n', "line 1: got another form"),
}


@pytest.mark.parametrize("format", SPOILED)
def test_a_malformed_corpus_is_one_sentence_naming_the_place(format: str, tmp_path: Path) -> None:
    name, content, message = SPOILED[format]
    write(tmp_path / name, content)
    with pytest.raises(InputError, match=message):
        load_stimuli(tmp_path, format)


def test_a_vignette_without_its_neutral_one_is_refused(tmp_path: Path) -> None:
    row = {"id": "B-1", "text": "t", "emotion": "grief", "matched_control_id": "N-1"}
    write(tmp_path / "stimuli.jsonl", json.dumps(row))
    with pytest.raises(InputError, match="vignette 'B-1': got no neutral vignette 'N-1'"):
        load_stimuli(tmp_path, "aipsy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "imdb"}, "unknown format 'imdb': expected one of goemotions"),
        ({"format": "sst2", "read": "first"}, "read got 'first'"),
        ({"format": "sst2", "scenarios": 0}, "got 0 scenarios"),
    ],
)
def test_bad_choices_are_one_sentence(options: dict[str, Any], message: str, data: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_stimuli(data / "sst2", **options)


def test_a_corpus_is_a_concept_by_format_and_path(corpora: dict[str, Path]) -> None:
    (advice,) = load_concept_file(f"esconv:{corpora['esconv']}", "control")
    assert (advice.name, advice.role, advice.speaker) == ("esconv_advice", "control", "assistant")
    assert advice.stimuli.digest == load_stimuli(corpora["esconv"], "esconv")[0].digest


def test_a_corpus_is_a_target_or_a_control_of_a_study_file_and_lies_beside_it(
    corpora: dict[str, Path],
) -> None:
    folder = corpora["esconv"].parent
    study = folder / "study.toml"
    study.write_text(
        'base = "b"\naligned = "a"\nstimuli = ["esconv:esconv"]\ncontrols = ["emobank:emobank", "tense"]'
    )
    spec = read_spec(study)
    assert spec.stimuli == (f"esconv:{folder / 'esconv'}",)
    assert spec.controls == (f"emobank:{folder / 'emobank'}", "tense")
    targets, controls = resolve_concepts(spec)
    assert [concept.name for concept in targets] == ["esconv_advice"]
    assert controls[-1].name == "tense" and {concept.role for concept in controls} == {"control"}


def test_rows_of_a_corpus_are_lines_of_a_stimuli_file(corpora: dict[str, Path]) -> None:
    for concept, lines in public_data.read_public(corpora["epitome"], "epitome", scenarios=4).items():
        assert stimuli_from_rows(json.loads(json.dumps(lines)), concept).n_scenarios == 4


def test_the_published_files_give_what_is_promised_of_them() -> None:
    """On the real files: how many scenarios there are, and that labels mean what they should."""
    folder = shared("data")
    words = {"goemotions": ("love", "hate"), "sst2": ("good", "bad")}
    for format, (good, bad) in words.items():
        (stimuli,) = load_stimuli(folder / format, format)
        assert stimuli.n_scenarios == 200
        count = {
            (word, y): sum(
                f" {word} " in f" {item.text.lower()} " for item in stimuli.items if item.label == y
            )
            for word in (good, bad)
            for y in (0, 1)
        }
        assert count[good, 1] + count[bad, 0] > count[good, 0] + count[bad, 1], format
