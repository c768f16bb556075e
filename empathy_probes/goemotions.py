"""GoEmotions (Demszky et al. 2020): valence of comments, and surface properties of neutral ones as controls."""

from __future__ import annotations

import re

from empathy_probes.corpus_files import bad_data, corpus_files, read_text
from empathy_probes.pairing import Labelled, PublicSet, Rule, group_texts, has_emoji, make_set, split_set

EMOTIONS = (
    "admiration", "amusement", "anger", "annoyance", "approval", "caring", "confusion", "curiosity", "desire",
    "disappointment", "disapproval", "disgust", "embarrassment", "excitement", "fear", "gratitude", "grief", "joy", "love",
    "nervousness", "optimism", "pride", "realization", "relief", "remorse", "sadness", "surprise", "neutral",
)  # fmt: skip
"""What the label ids of GoEmotions stand for."""
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


def goemotions_valence(path: str, scenarios: int, seed: int) -> list[PublicSet]:
    sides = {"negative": 0, "positive": 1}
    found = group_texts(_comments(path), tuple(sides))
    texts = [Labelled(text, label) for side, label in sides.items() for text in found[side]]
    return [make_set("goemotions_valence", "comment", texts, scenarios, seed)]


def goemotions_controls(path: str, scenarios: int, seed: int) -> list[PublicSet]:
    """Surface properties of neutral comments; no comment is in two of them."""
    left = [text for text in group_texts(_comments(path), ("neutral",))["neutral"] if not has_emoji(text)]
    built = []
    for done, (control, rules) in enumerate(PROPERTIES.items()):
        # Without a fair share the first controls would starve the last where many scenarios are wanted.
        share = max(1, len(left) // (2 * (len(PROPERTIES) - done)))
        one = split_set(f"goemotions_{control}", "comment", left, rules, min(scenarios, share), seed)
        used = {item.text for scenario in one.scenarios for item in scenario}
        left = [text for text in left if text not in used]
        built.append(one)
    return built


def _comments(path: str) -> list[tuple[str, str]]:
    """Comments with their polarity: positive, negative, neutral (that label alone) or mixed (all others)."""
    rows = []
    for file in corpus_files(path, "*.tsv"):
        # Split on \n only: comments may hold other line separators, and quotes are theirs, not the format's.
        for number, line in enumerate(read_text(file).split("\n"), start=1):
            if not line.strip():
                continue
            fields = line.rstrip("\r").split("\t")
            ids = fields[1].split(",") if len(fields) == 3 else []
            if not ids or not all(i.isascii() and i.isdigit() and int(i) < len(EMOTIONS) for i in ids):
                raise bad_data(
                    file, number, "another form", "text, label ids from 0 to 27 and id between tabs"
                )
            rows.append((fields[0], polarity({EMOTIONS[int(i)] for i in ids})))
    return rows


def polarity(emotions: set[str]) -> str:
    """Positive or negative when all emotions are; neutral when that is the only label; else mixed."""
    if emotions == {"neutral"}:
        return "neutral"
    if emotions <= POSITIVE:
        return "positive"
    return "negative" if emotions <= NEGATIVE else "mixed"


def _holds(pattern: str) -> Rule:
    found = re.compile(pattern, re.IGNORECASE)
    return lambda text: found.search(text) is not None


_QUESTION, _DIGIT, _COMMA, _NAME = map(_holds, (r"\?", r"\d", ",", r"\[name\]"))
_YOU = _holds(r"\b(you|your|yours|yourself|yourselves)\b")
_YOU_LOOSELY = _holds(r"\b(your?s?|yoursel(f|ves)|you(re|ve|ll)|ya|y['’]all|ur?)\b")
_PAST = _holds(r"\b(was|were|did|had|(was|were|did|had)n['’]?t)\b")
_PRESENT = _holds(r"\b(am|is|are|do|does|has|have|(is|are|do|does|has|have)n['’]?t)\b|['’](m|re|ve)\b")
_POSSIBLY_PRESENT = _holds(r"['’]s\b")  # "is", "has" or a possessive: never counted as past, nor as present

PROPERTIES: dict[str, tuple[Rule, Rule]] = {
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
"""Property, and its absence. Rarest first: each control draws from what the ones before it have left."""
