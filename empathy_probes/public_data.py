"""Readers of public labelled corpora: each format becomes rows of a stimuli file, for `load_stimuli(path, format=…)`.

Single texts are cleaned, used at most once per concept and grouped by `pairing` into scenarios of equal length; with grades
that are no few levels, a scenario holds one text of each third. A path is a file, or a folder as its authors publish it.

    format               concepts                      texts                                label
    goemotions           goemotions_valence            Reddit comments                      1 all labels positive, 0 all negative (grouping below)
    goemotions_controls  goemotions_question, …        comments labelled neutral only       1 where a surface property holds (`goemotions.PROPERTIES`)
    sst2                 sst2_valence                  film review sentences                as published
    politeness           politeness                    requests between editors             1 top, 0 bottom quarter of the score
    politeness_controls  politeness_link               the middle half of them              1 where the data set's mask for links stands
    repe_emotions        repe_valence, repe_emotion    second-person situations             happiness 1, four others 0; six categories
    emobank              emobank_valence, _arousal, _dominance    sentences                 the mean rating
    epitome              epitome_<mechanism>           a seeker's post and a response       level 0, 1, 2 of the response
    esconv               esconv_advice                 a seeker's and a supporter's turn    1 suggests, 0 asks or reflects
    aipsy                aipsy_affect                  keyword-free vignettes               1 affect, 0 its matched neutral: paired by their authors
    datasets             name of the data set          columns `text` and `label`           as published (extra `datasets`)

"Neutral" is the annotators' word, and a property can carry content. A bag-of-words valence classifier trained on GoEmotions
separates six controls near chance (AUROC .51 to .55, standard error .03, n about 200), but not questions (.40, towards
negative) nor masked names (.61, towards positive): run without these two as a check. Whom a text addresses is close to
linguistic distancing: leave `goemotions_second_person` out where that is the target. EmoBank's three ratings correlate, and
texts are matched on length alone. No text is in two controls of one source, so that their sampling errors are independent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from empathy_probes.corpus_files import bad_data, corpus_files, parse_number, read_csv, read_json, read_text
from empathy_probes.errors import InputError
from empathy_probes.goemotions import goemotions_controls, goemotions_valence
from empathy_probes.pairing import (
    MAX_DIFFERENCE,
    MAX_WORDS,
    Labelled,
    PublicSet,
    Rule,
    clean_text,
    generator,
    group_texts,
    make_set,
    pair_by_length,
    shuffled,
    split_set,
)

NEGATIVE_SITUATIONS = ("sadness", "anger", "fear", "disgust")
SITUATIONS = ("happiness", *NEGATIVE_SITUATIONS, "surprise")
RATINGS = {"V": "valence", "A": "arousal", "D": "dominance"}
ADVISING, EXPLORING = {"providing suggestions"}, {"question", "restatement or paraphrasing", "reflection of feelings"}  # fmt: skip


@dataclass(frozen=True)
class PublicFormat:
    """How one kind of corpus is read."""

    build: Callable[[str, int, int], list[PublicSet]]
    """From a path, a number of scenarios and a seed."""
    speaker: str = "user"
    """Whose state the texts carry."""


def read_public(
    path: str | Path, format: str, *, scenarios: int = 200, seed: int = 0, read: str = "mean"
) -> dict[str, list[dict[str, Any]]]:
    """The rows of a stimuli file for every concept of a public corpus.

    Args:
        path: the corpus, a file or a folder; for `datasets` a folder of `save_to_disk` or `OWNER/NAME[@REVISION][:SPLIT]`.
        format: one of `FORMATS`.
        scenarios: wanted per concept; there are fewer where the corpus has fewer.
        seed: which texts are drawn.
        read: `mean` over the text, or `last`.

    Raises:
        InputError: a file is missing or malformed, an option is unknown, or a concept would be empty; texts are not shown.
    """
    if format not in FORMATS:
        raise InputError(f"unknown format '{format}': expected one of {', '.join(FORMATS)}; choose one")
    if read not in ("mean", "last"):
        raise InputError(f"read got '{read}', expected mean or last; choose one")
    if scenarios < 1 or seed < 0:
        raise InputError(
            f"format '{format}' got {scenarios} scenarios and seed {seed}, expected at least 1 and 0; give other numbers"
        )
    built = FORMATS[format].build(str(path), scenarios, seed)
    for one in built:
        if not one.scenarios:
            raise InputError(
                f"{path} allows no scenario of '{one.name}': got no texts of every label within {MAX_DIFFERENCE} words of each "
                f"other and of at most {MAX_WORDS} words, expected at least one set; give all the data"
            )
    return {one.name: one.rows(read) for one in built}


# ---------------------------------------------------------------- other corpora of single texts


def _sst2(path: str, scenarios: int, seed: int) -> list[PublicSet]:
    texts = []
    for file in corpus_files(path, "*.csv"):
        for number, row in read_csv(file, ("label", "sentence")):
            if row["label"] not in {"0", "1"}:
                raise bad_data(file, number, f"label {row['label']!r}", "0 or 1")
            texts.append(Labelled(row["sentence"], int(row["label"])))
    return [make_set("sst2_valence", "review_sentence", texts, scenarios, seed)]


def _requests(path: str) -> dict[str, list[str]]:
    """Requests in the bottom quarter, the middle half or the top quarter of the politeness score."""
    scored = []
    for file in corpus_files(path, "*.csv"):
        for number, row in read_csv(file, ("request", "normalized_score")):
            scored.append((row["request"], parse_number(file, number, row["normalized_score"], "score")))
    low, high = np.quantile([score for _, score in scored], [0.25, 0.75])
    placed = [(t, "bottom" if s <= low else "top" if s >= high else "middle") for t, s in scored]
    return group_texts(placed, ("bottom", "middle", "top"))


def _politeness(path: str, scenarios: int, seed: int) -> list[PublicSet]:
    found = _requests(path)
    texts = [Labelled(text, label) for label, side in enumerate(("bottom", "top")) for text in found[side]]
    return [make_set("politeness", "request", texts, scenarios, seed)]


def _politeness_controls(path: str, scenarios: int, seed: int) -> list[PublicSet]:
    rules: tuple[Rule, Rule] = (lambda text: "<url>" in text, lambda text: "<url>" not in text)
    return [split_set("politeness_link", "request", _requests(path)["middle"], rules, scenarios, seed)]


def _repe_emotions(path: str, scenarios: int, seed: int) -> list[PublicSet]:
    texts = []
    for emotion in SITUATIONS:
        file = Path(path) / f"{emotion}.json"
        listed = read_json(file)
        if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
            raise bad_data(file, 1, f"JSON {type(listed).__name__}", "a JSON list of strings")
        texts += [Labelled(text, emotion) for text in listed]
    groups = group_texts([(item.text, str(item.label)) for item in texts], SITUATIONS)
    # Happiness against four negative emotions in equal shares, each with its own part of happiness.
    rng = generator(seed, "repe_valence")
    happy, n = shuffled(groups["happiness"], rng), len(NEGATIVE_SITUATIONS)
    found: list[dict[int, str]] = []
    for part, emotion in enumerate(NEGATIVE_SITUATIONS):
        share = (scenarios + n - 1 - part) // n
        found += pair_by_length({0: groups[emotion], 1: happy[part::n]}, share, rng) if share else []
    valence = tuple(tuple(Labelled(text, label) for label, text in pair.items()) for pair in found)
    return [
        PublicSet("repe_valence", "situation", valence),
        make_set("repe_emotion", "situation", texts, scenarios, seed),
    ]


def _emobank(path: str, scenarios: int, seed: int) -> list[PublicSet]:
    texts: dict[str, list[Labelled]] = {name: [] for name in RATINGS.values()}
    for file in corpus_files(path, "emobank.csv"):
        for number, row in read_csv(file, (*map(str.lower, RATINGS), "text")):
            for column, name in RATINGS.items():
                rating = parse_number(file, number, row[column.lower()], column)
                texts[name].append(Labelled(row["text"], rating))
    return [make_set(f"emobank_{n}", "sentence", found, scenarios, seed) for n, found in texts.items()]


# ---------------------------------------------------------------- responses to somebody


def _epitome(path: str, scenarios: int, seed: int) -> list[PublicSet]:
    built = []
    for file in corpus_files(path, "*-reddit.csv"):
        texts = []
        for number, row in read_csv(file, ("seeker_post", "response_post", "level")):
            if row["level"] not in {"0", "1", "2"}:
                raise bad_data(file, number, f"level {row['level']!r}", "0, 1 or 2")
            texts.append(Labelled(row["response_post"], int(row["level"]), row["seeker_post"]))
        mechanism = file.stem.removesuffix("-reddit").replace("-", "_")
        built.append(make_set(f"epitome_{mechanism}", "peer response", texts, scenarios, seed))
    return built


def _esconv(path: str, scenarios: int, seed: int) -> list[PublicSet]:
    """Supporters' turns that answer a seeker's; turns of one speaker in a row are one to the other."""
    texts = []
    (file,) = corpus_files(path, "ESConv.json")
    talks = read_json(file)
    if not isinstance(talks, list):
        raise bad_data(file, 1, f"JSON {type(talks).__name__}", "a JSON list of conversations")
    for number, talk in enumerate(talks, start=1):
        asked: list[str] = []
        try:
            turns = [(t["speaker"], t["content"], t.get("annotation", {})) for t in talk["dialog"]]
            for speaker, content, notes in turns:
                if speaker == "seeker":
                    asked.append(content)
                    continue
                strategy = str(notes["strategy"]).lower()
                if asked and strategy in ADVISING | EXPLORING:
                    texts.append(Labelled(content, int(strategy in ADVISING), " ".join(asked)))
                asked = []
        except (KeyError, TypeError, AttributeError):
            raise InputError(
                f"{file}, conversation {number}: got another form, expected a 'dialog' of turns with 'speaker', 'content' and, "
                "of supporters, 'annotation' with a 'strategy'; fetch the file again"
            ) from None
    return [make_set("esconv_advice", "support chat", texts, scenarios, seed)]


def _aipsy(path: str, scenarios: int, seed: int) -> list[PublicSet]:
    """Vignettes beside the neutral one that their authors matched to each: scenarios as they are."""
    texts: dict[str, Mapping[str, Any]] = {}
    for file in corpus_files(path, "*.jsonl"):
        for number, line in enumerate(read_text(file).split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                texts[row["id"]] = {k: row[k] for k in ("text", "emotion", "matched_control_id")}
            except (ValueError, KeyError, TypeError):
                raise bad_data(file, number, "another form", "an object with id, text, emotion and matched_control_id") from None  # fmt: skip
    pairs = []
    for name, row in texts.items():
        control = texts.get(row["matched_control_id"] or "")
        if row["emotion"] == "neutral" or row["matched_control_id"] is None:
            continue
        if control is None or control["emotion"] != "neutral":
            raise InputError(
                f"{path}, vignette '{name}': got no neutral vignette '{row['matched_control_id']}', expected the one matched to "
                "it; give all the data"
            )
        pairs.append((Labelled(clean_text(control["text"]), 0), Labelled(clean_text(row["text"]), 1)))
    order = generator(seed, "aipsy_affect").permutation(len(pairs))[:scenarios]
    return [PublicSet("aipsy_affect", "vignette", tuple(pairs[i] for i in sorted(order)))]


# ---------------------------------------------------------------- Hugging Face datasets


def _datasets(path: str, scenarios: int, seed: int) -> list[PublicSet]:
    """Columns `text` and `label` of a data set on disk or on the Hub; rename others first."""
    try:
        import datasets
    except ImportError:
        raise InputError(
            "format 'datasets' needs the package datasets, which is not installed; pip install 'empathy-probes[datasets]'"
        ) from None
    place, _, split = path.partition(":")
    name, _, revision = place.partition("@")
    try:
        if Path(place).is_dir():
            found = datasets.load_from_disk(place)
            found = found[split or "train"] if isinstance(found, datasets.DatasetDict) else found
        else:
            found = datasets.load_dataset(name, revision=revision or None, split=split or "train")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"the data set '{path}' cannot be loaded ({' '.join(str(error).split())[:200]}), expected a folder of save_to_disk or "
            "OWNER/NAME[@REVISION][:SPLIT]; check the name"
        ) from None
    if missing := sorted({"text", "label"} - set(found.column_names)):
        raise InputError(
            f"the data set '{path}' has the columns {', '.join(found.column_names)}, expected {' and '.join(missing)} among "
            "them; use rename_column and save_to_disk"
        )
    names = getattr(found.features["label"], "names", None)
    texts = []
    for text, label in zip(found["text"], found["label"], strict=True):
        single = isinstance(label, int | float | str) and not isinstance(label, bool)
        if not isinstance(text, str) or not single or (names and label < 0):
            raise InputError(
                f"the data set '{path}' has a row with text of type {type(text).__name__} and label {label!r}, expected a text "
                "and one label, a number or a string; choose a split that is labelled, or map its labels"
            )
        # Two names are the two sides of one contrast, more are categories.
        texts.append(Labelled(text, names[label] if names and len(names) > 2 else label))
    concept = re.sub(r"[^\w .,+()-]", "_", Path(name).name)
    return [make_set(concept, "text", texts, scenarios, seed)]


FORMATS: dict[str, PublicFormat] = {
    "goemotions": PublicFormat(goemotions_valence),
    "goemotions_controls": PublicFormat(goemotions_controls),
    "sst2": PublicFormat(_sst2),
    "politeness": PublicFormat(_politeness),
    "politeness_controls": PublicFormat(_politeness_controls),
    "repe_emotions": PublicFormat(_repe_emotions),
    "emobank": PublicFormat(_emobank),
    "epitome": PublicFormat(_epitome, "assistant"),
    "esconv": PublicFormat(_esconv, "assistant"),
    "aipsy": PublicFormat(_aipsy, "third_person"),
    "datasets": PublicFormat(_datasets),
}
"""One entry per format; its reader is all that a new corpus needs."""
