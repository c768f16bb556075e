"""Turn public labelled texts into stimuli files: length-matched scenarios that any `--stimuli` takes.

    python scripts/prepare_public_data.py --data ../shared/data --out runs/public-stimuli

Every text is cleaned, used at most once per file, and grouped with texts of the other labels that are as long
(equal word counts where the data allow, never more than `MAX_DIFFERENCE` words apart). Texts of a scenario
share nothing but their length: a weaker contrast than written minimal pairs, and good for trying things on.

They are read as the mean over the text; `--read last` reads the last token.

Targets
    goemotions_valence   Reddit comments: all labels positive (1) or all negative (0), grouping below
    sst2_valence         film review sentences: positive (1), negative (0)
    politeness           requests between Wikipedia editors: top (1), bottom (0) quarter of the score
    repe_valence         second-person situations: happiness (1); sadness, anger, fear, disgust equally (0)
    repe_emotion         the same lists and surprise: six string labels, one text of each per scenario
Controls: surface properties, label 1 where the property holds. The texts are comments that annotators
labelled neutral and nothing else, without emoji (`politeness_link`: requests from the middle half of the
score). No text is in two control files, so that their sampling errors are independent.
    goemotions_question       ends with a question mark; 0: has none
    goemotions_capital        begins with a capital letter; 0: begins with a small letter
    goemotions_tense          past forms of be, do, have and no present form; 0: the reverse
    goemotions_digit          contains a digit; 0: contains none
    goemotions_name           contains the data set's mask for names; 0: does not
    goemotions_comma          contains a comma; 0: contains none
    goemotions_second_person  contains "you" or a form of it; 0: does not. Whom a text addresses is close to
                              linguistic distancing: leave this control out where that is the target
    politeness_link           contains the data set's mask for links; 0: does not

"Neutral" is the annotators' word, and a property can carry content. A bag-of-words valence classifier trained
on GoEmotions separates six controls near chance (AUROC .51 to .55, standard error .03, n about 200), but not
questions (.40, towards negative) nor masked names (.61, towards positive): run without these two as a check.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import math
import os
import re
import sys
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment

MAX_WORDS = 60
MAX_DIFFERENCE = 2  # words between the longest and the shortest text of a scenario

# The grouping of Demszky et al. 2020 (GoEmotions), figure 2; realization, surprise, curiosity and confusion
# are ambiguous there and count as neither.
POSITIVE = {
    "admiration", "amusement", "approval", "caring", "desire", "excitement", "gratitude", "joy", "love",
    "optimism", "pride", "relief",
}  # fmt: skip
NEGATIVE = {
    "anger", "annoyance", "disappointment", "disapproval", "disgust", "embarrassment", "fear", "grief",
    "nervousness", "remorse", "sadness",
}  # fmt: skip
NEGATIVE_SITUATIONS = ("sadness", "anger", "fear", "disgust")
SITUATIONS = ("happiness", *NEGATIVE_SITUATIONS, "surprise")

LICENCES = {
    "goemotions": "Apache-2.0 repository; the texts are Reddit comments",
    "politeness": "Apache-2.0 repository; the texts are requests on Wikipedia talk pages",
    "repe_emotions": "MIT",
    "sst2": "MIT repository; the texts are sentences of film reviews",
}

Label = int | str
Scenario = dict[Label, str]
Groups = dict[Label, list[str]]
Rule = Callable[[str], bool]


class DataError(Exception):
    """The data folder, or what was asked of it, is not usable; the message is one sentence."""


@dataclass(frozen=True)
class PublicSet:
    """One stimuli file before it is written."""

    name: str
    """Stem of the file, and the concept."""
    folder: str
    """Folder of the data that the texts come from."""
    frame: str
    """What kind of text all of them are."""
    scenarios: list[Scenario]
    """One text of each label, per scenario."""


def _holds(pattern: str) -> Rule:
    found = re.compile(pattern, re.IGNORECASE)
    return lambda text: found.search(text) is not None


_QUESTION, _DIGIT, _COMMA, _NAME, _LINK = map(_holds, (r"\?", r"\d", ",", r"\[name\]", "<url>"))
_YOU = _holds(r"\b(you|your|yours|yourself|yourselves)\b")
_YOU_LOOSELY = _holds(r"\b(your?s?|yoursel(f|ves)|you(re|ve|ll)|ya|y['’]all|ur?)\b")
_PAST = _holds(r"\b(was|were|did|had|(was|were|did|had)n['’]?t)\b")
_PRESENT = _holds(r"\b(am|is|are|do|does|has|have|(is|are|do|does|has|have)n['’]?t)\b|['’](m|re|ve)\b")
_POSSIBLY_PRESENT = _holds(r"['’]s\b")  # "is", "has" or a possessive: never counted as past, nor as present

# Property, and its absence. Rarest first: each control draws from what the ones before it have left.
CONTROLS: dict[str, tuple[Rule, Rule]] = {
    "question": (lambda text: text.endswith("?"), lambda text: not _QUESTION(text)),
    "capital": (lambda text: text[0].isupper(), lambda text: text[0].islower()),
    "tense": (
        lambda text: _PAST(text) and not _PRESENT(text) and not _POSSIBLY_PRESENT(text),
        lambda text: _PRESENT(text) and not _PAST(text),
    ),
    "digit": (_DIGIT, lambda text: not _DIGIT(text)),
    "comma": (_COMMA, lambda text: not _COMMA(text)),
    "name": (_NAME, lambda text: not _NAME(text)),
    "second_person": (_YOU, lambda text: not _YOU_LOOSELY(text)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Read the data, pair the texts, write the files; 0 when done, 2 on bad input with nothing written."""
    parser = argparse.ArgumentParser(
        prog="prepare_public_data",
        usage=argparse.SUPPRESS,
        description="Turn public labelled texts into length-matched stimuli files (JSON Lines).",
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the public data")
    parser.add_argument("--out", type=Path, default=Path("runs/public-stimuli"), help="folder to write to")
    parser.add_argument("--scenarios", type=_at_least(1), default=200, help="scenarios wanted per file")
    parser.add_argument("--seed", type=_at_least(0), default=0, help="which texts are drawn")
    parser.add_argument(
        "--read", choices=("mean", "last"), default="mean", help="mean over the whole text, or its last token"
    )
    options = parser.parse_args(argv)
    try:
        origins = read_origins(options.data)
        sets = build_sets(options.data, options.scenarios, options.seed)
        contents = {f"{built.name}.jsonl": stimuli_lines(built, options.read) for built in sets}
        contents["SOURCES.txt"] = describe_sources(sets, origins, options.seed)
        write_all(options.out, contents)
    except DataError as error:
        print(f"prepare_public_data: {error}", file=sys.stderr)
        return 2
    for built in sets:
        short = len(built.scenarios) < options.scenarios
        note = f"; {options.scenarios} wanted, no more could be matched" if short else ""
        print(f"{built.name}: {describe_lengths(built)}{note}")
    return 0


def build_sets(data: Path, scenarios: int, seed: int) -> list[PublicSet]:
    """All sets from a data folder, targets first.

    Args:
        data: folder with `goemotions`, `sst2`, `politeness` and `repe_emotions`.
        scenarios: scenarios wanted per set; a set has fewer where its data have fewer.
        seed: which texts are drawn; each set draws from a generator of its own.

    Raises:
        DataError: a file is missing or malformed, or a set would be empty.
    """
    comments = group_texts(read_goemotions(data / "goemotions"), ("negative", "positive", "neutral", "mixed"))
    sentences = group_texts(read_sst2(data / "sst2"), (0, 1))
    requests = group_texts(read_politeness(data / "politeness"), ("bottom", "middle", "top"))
    situations = group_texts(read_situations(data / "repe_emotions"), SITUATIONS)
    valence: Groups = {0: comments["negative"], 1: comments["positive"]}
    polite: Groups = {0: requests["bottom"], 1: requests["top"]}
    linked = split_by(requests["middle"], _LINK, lambda text: not _LINK(text))

    def paired(name: str, folder: str, frame: str, groups: Groups) -> PublicSet:
        return PublicSet(name, folder, frame, pair_by_length(groups, scenarios, generator(seed, name)))

    happiness = situation_valence(situations, scenarios, generator(seed, "repe_valence"))
    sets = [
        paired("goemotions_valence", "goemotions", "comment", valence),
        paired("sst2_valence", "sst2", "review_sentence", sentences),
        paired("politeness", "politeness", "request", polite),
        PublicSet("repe_valence", "repe_emotions", "situation", happiness),
        paired("repe_emotion", "repe_emotions", "situation", situations),
        *neutral_controls(comments["neutral"], scenarios, seed),
        paired("politeness_link", "politeness", "request", linked),
    ]
    for built in sets:
        if not built.scenarios:
            raise DataError(
                f"{data / built.folder} allows no scenario of '{built.name}': got no texts of every label "
                f"within {MAX_DIFFERENCE} words of each other, expected at least one set; give all the data"
            )
    return sets


def situation_valence(groups: Groups, scenarios: int, rng: np.random.Generator) -> list[Scenario]:
    """Happiness against four negative emotions in equal shares, each with its own part of happiness."""
    happy = shuffled(groups["happiness"], rng)
    n_negative = len(NEGATIVE_SITUATIONS)
    found: list[Scenario] = []
    for part, emotion in enumerate(NEGATIVE_SITUATIONS):
        share = (scenarios + n_negative - 1 - part) // n_negative
        found += pair_by_length({0: groups[emotion], 1: happy[part::n_negative]}, share, rng)
    return found


def neutral_controls(neutral: Sequence[str], scenarios: int, seed: int) -> list[PublicSet]:
    """The controls made of neutral comments; no comment is in two of them."""
    left = [text for text in neutral if not has_emoji(text)]
    built = []
    for done, (control, (present, absent)) in enumerate(CONTROLS.items()):
        name = f"goemotions_{control}"
        # Without a fair share the first controls would starve the last where many scenarios are wanted.
        share = max(1, len(left) // (2 * (len(CONTROLS) - done)))
        found = pair_by_length(split_by(left, present, absent), min(scenarios, share), generator(seed, name))
        used = {text for scenario in found for text in scenario.values()}
        left = [text for text in left if text not in used]
        built.append(PublicSet(name, "goemotions", "comment", found))
    return built


def pair_by_length(groups: Groups, n: int, rng: np.random.Generator) -> list[Scenario]:
    """At most `n` scenarios holding one text of each label, of matched length, each text used once.

    Random texts of the scarcest label are taken as they come, so that its lengths are represented; for every
    other label the assignment of least total length difference is solved over all texts left. A scenario
    whose texts differ by more than `MAX_DIFFERENCE` words is given up, and the next texts of the scarcest
    label are tried in its place.
    """
    pools = {label: shuffled(texts, rng) for label, texts in groups.items()}
    scarcest = min(pools, key=lambda label: len(pools[label]))
    queue = pools.pop(scarcest)
    found: list[Scenario] = []
    while queue and len(found) < n and all(pools.values()):
        size = min(n - len(found), len(queue), *(len(pool) for pool in pools.values()))
        batch, queue = queue[:size], queue[size:]
        partners = {label: assign_by_length(batch, pool) for label, pool in pools.items()}
        for row, text in enumerate(batch):
            texts = {scarcest: text, **{label: partners[label][row] for label in pools}}
            counts = [count_words(text) for text in texts.values()]
            if max(counts) - min(counts) <= MAX_DIFFERENCE:
                found.append({label: texts[label] for label in groups})
        used = {text for scenario in found for text in scenario.values()}
        pools = {label: [text for text in pool if text not in used] for label, pool in pools.items()}
    return found


def assign_by_length(batch: Sequence[str], pool: Sequence[str]) -> list[str]:
    """For each text of `batch` its own partner from `pool` (which holds at least as many texts)."""
    words = [np.array([count_words(text) for text in texts]) for texts in (batch, pool)]
    characters = [np.array([len(text) for text in texts]) for texts in (batch, pool)]
    # Words decide; characters only choose among equal word counts.
    cost = np.abs(np.subtract.outer(*words)) + np.abs(np.subtract.outer(*characters)) / 1000
    _, columns = linear_sum_assignment(cost)
    return [pool[column] for column in columns]


def split_by(texts: Sequence[str], present: Rule, absent: Rule) -> Groups:
    """Texts with the property (1) and without it (0); texts that are neither are left out."""
    return {0: [text for text in texts if absent(text)], 1: [text for text in texts if present(text)]}


def generator(seed: int, name: str) -> np.random.Generator:
    """A generator keyed by what it draws, so that one set does not depend on the sets before it."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def shuffled(texts: Sequence[str], rng: np.random.Generator) -> list[str]:
    """The texts in random order."""
    return [texts[i] for i in rng.permutation(len(texts))]


def group_texts(labelled: Iterable[tuple[str, Label]], labels: Sequence[Label]) -> Groups:
    """Clean texts of each label, in order of appearance.

    Empty texts, texts of more than `MAX_WORDS` words and repetitions (case aside) are dropped, and a text
    that occurs under two labels is dropped altogether: either label would be a guess.
    """
    first: dict[str, tuple[str, Label]] = {}
    disputed = set()
    for raw, label in labelled:
        text = clean_text(raw)
        if not text or count_words(text) > MAX_WORDS:
            continue
        key = text.casefold()
        if first.setdefault(key, (text, label))[1] != label:
            disputed.add(key)
    groups: Groups = {label: [] for label in labels}
    for key, (text, label) in first.items():
        if key not in disputed:
            groups[label].append(text)
    return groups


def clean_text(text: str) -> str:
    """The text with single spaces, without control and zero-width characters.

    >>> clean_text("  a\\u200b  b\\n")
    'a b'
    """
    kept = (c for c in text if c.isspace() or c == "\u200d" or unicodedata.category(c) not in {"Cc", "Cf"})
    return " ".join("".join(kept).split())


def count_words(text: str) -> int:
    """Words between spaces: a length that does not depend on a model's tokenizer."""
    return len(text.split())


def has_emoji(text: str) -> bool:
    """Whether the text holds a symbol of the kind that emoji are."""
    return any(unicodedata.category(c) == "So" for c in text)


def read_origins(data: Path) -> dict[str, str]:
    """First line of each folder's `SOURCE.txt`: address and commit."""
    if not data.is_dir():
        raise DataError(
            f"no data folder at {data}: expected a folder holding {', '.join(LICENCES)}; give it with --data"
        )
    origins = {}
    for folder in LICENCES:
        lines = read_text(data / folder / "SOURCE.txt").strip().splitlines()
        if not lines:
            raise bad_data(data / folder / "SOURCE.txt", 1, "nothing", "the address and commit of the data")
        origins[folder] = lines[0].strip()
    return origins


def read_goemotions(folder: Path) -> list[tuple[str, Label]]:
    """Comments with their polarity: positive, negative, neutral (that label alone) or mixed (all others)."""
    names = read_text(folder / "labels.txt").split()
    missing = sorted((POSITIVE | NEGATIVE | {"neutral"}) - set(names))
    if missing:
        raise bad_data(folder / "labels.txt", 1, f"no {', '.join(missing)}", "the 28 labels of GoEmotions")
    rows: list[tuple[str, Label]] = []
    for name in ("dev.tsv", "test.tsv"):
        # Split on \n only: comments may hold other line separators, and quotes are theirs, not the format's.
        for number, line in enumerate(read_text(folder / name).split("\n"), start=1):
            if not line.strip():
                continue
            fields = line.rstrip("\r").split("\t")
            ids = fields[1].split(",") if len(fields) == 3 else []
            if not ids or not all(i.isascii() and i.isdigit() and int(i) < len(names) for i in ids):
                raise bad_data(folder / name, number, "another form", "text, label ids and id between tabs")
            rows.append((fields[0], polarity({names[int(i)] for i in ids})))
    return rows


def polarity(emotions: set[str]) -> str:
    """Positive or negative when all emotions are; neutral when that is the only label; else mixed."""
    if emotions == {"neutral"}:
        return "neutral"
    if emotions <= POSITIVE:
        return "positive"
    return "negative" if emotions <= NEGATIVE else "mixed"


def read_sst2(folder: Path) -> list[tuple[str, Label]]:
    """Review sentences of both files with label 0 or 1."""
    rows: list[tuple[str, Label]] = []
    for name in ("dev_binary_sent.csv", "test_binary_sent.csv"):
        for number, row in read_csv(folder / name, ("label", "sentence")):
            if row["label"] not in {"0", "1"}:
                raise bad_data(folder / name, number, f"label {row['label']!r}", "0 or 1")
            rows.append((row["sentence"], int(row["label"])))
    return rows


def read_politeness(folder: Path) -> list[tuple[str, Label]]:
    """Requests in the bottom quarter, the middle half or the top quarter of the politeness score."""
    path = folder / "wikipedia.csv"
    scored = []
    for number, row in read_csv(path, ("request", "normalized_score")):
        try:
            score = float(row["normalized_score"])
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise bad_data(path, number, f"score {row['normalized_score']!r}", "a finite number")
        scored.append((row["request"], score))
    low, high = np.quantile([score for _, score in scored], [0.25, 0.75])
    return [
        (text, "bottom" if score <= low else "top" if score >= high else "middle") for text, score in scored
    ]


def read_situations(folder: Path) -> list[tuple[str, Label]]:
    """Situations of the six emotion lists, labelled by emotion."""
    rows: list[tuple[str, Label]] = []
    for emotion in SITUATIONS:
        path = folder / f"{emotion}.json"
        try:
            texts = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise bad_data(path, error.lineno, error.msg, "a JSON list of strings") from None
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise bad_data(path, 1, f"JSON {type(texts).__name__}", "a JSON list of strings")
        rows += [(text, emotion) for text in texts]
    return rows


def read_csv(path: Path, columns: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """Rows of a comma-separated file with their line numbers; at least one row."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    absent = [column for column in columns if column not in (reader.fieldnames or [])]
    if absent:
        raise bad_data(path, 1, f"no column {', '.join(absent)}", f"the columns {', '.join(columns)}")
    rows = []
    try:
        for row in reader:
            if any(row[column] is None for column in columns) or None in row:
                raise bad_data(path, reader.line_num, "another number of fields", "one field per column")
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise bad_data(path, reader.line_num, str(error), "comma-separated values") from None
    if not rows:
        raise bad_data(path, 2, "no rows", "at least one row")
    return rows


def read_text(path: Path) -> str:
    """A file's text; line endings are kept as they are."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(
            f"cannot read {path} ({error.strerror}): expected a file of the public data; check --data"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: got an invalid byte at {error.start}, expected UTF-8; fetch the file again"
        ) from None


def bad_data(path: Path, line: int, got: str, expected: str) -> DataError:
    """The error for a malformed file; never shows a text of the data."""
    return DataError(f"{path}, line {line}: got {got}, expected {expected}; fetch the file again")


def stimuli_lines(built: PublicSet, read: str = "last") -> str:
    """The set in the stimuli format, one JSON object per line.

    Unlike minimal pairs these texts end anyhow, often in a full stop, so `mean` reads the span of the whole text.
    """
    lines = []
    for number, texts in enumerate(built.scenarios):
        scenario = f"{built.name}-{number:04d}"
        for label, text in texts.items():
            row = {"id": f"{scenario}-{label}", "scenario": scenario, "text": text, "label": label}
            row |= {"read": {"span": text}} if read == "mean" else {}
            lines.append(json.dumps({**row, "frame": built.frame}, ensure_ascii=False) + "\n")
    return "".join(lines)


def length_differences(built: PublicSet) -> tuple[float, float]:
    """Mean paired difference in words, and its mean absolute value, over scenarios and pairs of labels.

    The sign is 1 minus 0; over six emotions it is later minus earlier and only the absolute value says much.
    """
    differences = [
        second - first
        for scenario in built.scenarios
        for first, second in itertools.combinations([count_words(text) for text in scenario.values()], 2)
    ]
    return float(np.mean(differences)), float(np.mean(np.abs(differences)))


def describe_lengths(built: PublicSet) -> str:
    """How well the lengths match: exact for the file as it is, hence without an interval."""
    mean, absolute = length_differences(built)
    n = len(built.scenarios)
    return f"n = {n} scenarios, mean paired length difference {mean:+.3f}, absolute {absolute:.3f} words"


def describe_sources(sets: Iterable[PublicSet], origins: Mapping[str, str], seed: int) -> str:
    """The text of `SOURCES.txt`: source and licence of every file."""
    parts = [f"Made by scripts/prepare_public_data.py, seed {seed}; its docstring describes every file.\n"]
    for built in sets:
        labels = ", ".join(str(label) for label in built.scenarios[0])
        parts.append(
            f"\n{built.name}.jsonl\n  source: {origins[built.folder]}\n  licence: {LICENCES[built.folder]}\n"
            f"  one text of each label ({labels}) per scenario; {describe_lengths(built)}\n"
        )
    return "".join(parts)


def write_all(out: Path, contents: Mapping[str, str]) -> None:
    """Write every file beside its place and move it there: a file is old or new, never half."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=out)
            try:
                with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
                    file.write(content)
                os.chmod(temporary, 0o644)  # mkstemp's 0600 would keep collaborators from reading
                os.replace(temporary, out / name)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise DataError(
            f"cannot write to {out} ({error.strerror}): expected a writable folder; choose another --out"
        ) from None


def _at_least(lowest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from {lowest}; give one")
        return int(text)

    return number


if __name__ == "__main__":
    sys.exit(main())
