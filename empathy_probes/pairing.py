"""Single labelled texts into scenarios: one text of each group, of matched length, each text used once.

Public corpora label texts one by one, whereas a contrast needs texts that differ in the label and in as little else as
possible. Random texts of the scarcest group are taken as they come, so that its lengths are represented; for every other
group the assignment of least total length difference is solved over all texts left. Texts of a scenario then share
nothing but their length: a weaker contrast than written minimal pairs.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

MAX_WORDS = 60
MAX_DIFFERENCE = 2  # words between the longest and the shortest text of a scenario
Group = TypeVar("Group", bound=Hashable)
MAX_BEFORE = 150  # words of what a response answers
FEW_LEVELS = 3  # grades of which a scenario holds one text each
Label = float | int | str
Rule = Callable[[str], bool]


@dataclass(frozen=True)
class Labelled:
    """One text of a corpus."""

    text: str
    label: Label
    before: str = ""
    """What the text answers; empty where it stands alone."""


@dataclass(frozen=True)
class PublicSet:
    """One concept of a corpus, in scenarios."""

    name: str
    frame: str
    """What kind of text all of them are."""
    scenarios: tuple[tuple[Labelled, ...], ...]
    """One text of each group, per scenario."""

    def rows(self, read: str) -> list[dict[str, Any]]:
        """The lines of a stimuli file: read as the mean over a text (or response), or at its last token."""
        rows = []
        for number, texts in enumerate(self.scenarios):
            scenario = f"{self.name}-{number:04d}"
            for place, item in enumerate(texts):
                # Grades of a scenario may be equal, names of its texts may not.
                mark = item.label if isinstance(item.label, int | str) else place
                row: dict[str, Any] = {"id": f"{scenario}-{mark}", "scenario": scenario}
                if item.before:
                    turns = (("user", item.before), ("assistant", item.text))
                    row["messages"] = [{"role": role, "content": content} for role, content in turns]
                else:
                    row["text"] = item.text
                row["label"] = item.label
                if read == "mean":
                    row["read"] = {"span": item.text}
                elif item.before:
                    row["read"] = {"message": 1}
                rows.append({**row, "frame": self.frame})
        return rows


def make_set(name: str, frame: str, texts: Iterable[Labelled], scenarios: int, seed: int) -> PublicSet:
    """Pair texts by length: one of each label, or of each third of the grades."""
    kept = [text for text in texts if _usable(text)]
    group_of = _grouping([text.label for text in kept])
    order = sorted({group_of(text.label) for text in kept}) if kept else []
    if kept and isinstance(kept[0].label, str):
        order = list(dict.fromkeys(text.label for text in kept))
    groups = group_texts([(text.text, group_of(text.label)) for text in kept], order)
    of: dict[str, Labelled] = {}
    for text in kept:
        of.setdefault(
            clean_text(text.text), Labelled(clean_text(text.text), text.label, clean_text(text.before))
        )
    found = pair_by_length(groups, scenarios, generator(seed, name)) if len(groups) > 1 else []
    return PublicSet(name, frame, tuple(tuple(of[text] for text in pair.values()) for pair in found))


def _usable(item: Labelled) -> bool:
    """A response must be told from what it answers, which must not be endless."""
    text, before = clean_text(item.text), clean_text(item.before)
    return not before or (text not in before and count_words(before) <= MAX_BEFORE)


def _grouping(labels: Sequence[Label]) -> Callable[[Label], Any]:
    """Labels as they are where there are few; else the third of the grades they lie in."""
    levels = set(labels)
    if any(isinstance(label, str) for label in levels) or len(levels) <= FEW_LEVELS:
        return lambda label: label
    low, high = np.quantile(np.array(labels, float), [1 / 3, 2 / 3])
    return lambda label: int(label > low) + int(label > high)


def split_set(
    name: str, frame: str, texts: Sequence[str], rules: tuple[Rule, Rule], scenarios: int, seed: int
) -> PublicSet:
    """Texts with a property (1) and without it (0); texts that are neither are left out."""
    present, absent = rules
    groups = {0: [t for t in texts if absent(t)], 1: [t for t in texts if present(t)]}
    found = pair_by_length(groups, scenarios, generator(seed, name))
    return PublicSet(name, frame, tuple(tuple(Labelled(t, y) for y, t in pair.items()) for pair in found))


def group_texts(labelled: Iterable[tuple[str, Group]], groups: Sequence[Group]) -> dict[Group, list[str]]:
    """Clean texts of each group, in order of appearance; other groups are left out.

    Empty texts, texts of more than `MAX_WORDS` words and repetitions (case aside) are dropped, and a text that occurs in
    two groups, listed or not, is dropped altogether: either label would be a guess.
    """
    first: dict[str, tuple[str, Group]] = {}
    disputed = set()
    for raw, group in labelled:
        text = clean_text(raw)
        if not text or count_words(text) > MAX_WORDS:
            continue
        if first.setdefault(text.casefold(), (text, group))[1] != group:
            disputed.add(text.casefold())
    found: dict[Group, list[str]] = {group: [] for group in groups}
    for key, (text, group) in first.items():
        if key not in disputed and group in found:
            found[group].append(text)
    return found


def pair_by_length(
    groups: Mapping[Group, Sequence[str]], n: int, rng: np.random.Generator
) -> list[dict[Group, str]]:
    """At most `n` scenarios holding one text of each group.

    A scenario whose texts differ by more than `MAX_DIFFERENCE` words is given up, and the next texts of the scarcest group
    are tried in its place.
    """
    pools = {group: shuffled(texts, rng) for group, texts in groups.items()}
    scarcest = min(pools, key=lambda group: len(pools[group]))
    queue = pools.pop(scarcest)
    found: list[dict[Group, str]] = []
    while queue and len(found) < n and all(pools.values()):
        size = min(n - len(found), len(queue), *(len(pool) for pool in pools.values()))
        batch, queue = queue[:size], queue[size:]
        partners = {group: _assign_by_length(batch, pool) for group, pool in pools.items()}
        for row, text in enumerate(batch):
            texts = {scarcest: text, **{group: partners[group][row] for group in pools}}
            counts = [count_words(text) for text in texts.values()]
            if max(counts) - min(counts) <= MAX_DIFFERENCE:
                found.append({group: texts[group] for group in groups})
        used = {text for scenario in found for text in scenario.values()}
        pools = {group: [text for text in pool if text not in used] for group, pool in pools.items()}
    return found


def _assign_by_length(batch: Sequence[str], pool: Sequence[str]) -> list[str]:
    """For each text of `batch` its own partner from `pool` (which holds at least as many texts)."""
    from scipy.optimize import linear_sum_assignment

    words = [np.array([count_words(text) for text in texts]) for texts in (batch, pool)]
    characters = [np.array([len(text) for text in texts]) for texts in (batch, pool)]
    # Words decide; characters only choose among equal word counts.
    cost = np.abs(np.subtract.outer(*words)) + np.abs(np.subtract.outer(*characters)) / 1000
    _, columns = linear_sum_assignment(cost)
    return [pool[column] for column in columns]


def generator(seed: int, name: str) -> np.random.Generator:
    """A generator keyed by what it draws, so that one set does not depend on the sets before it."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def shuffled(texts: Sequence[str], rng: np.random.Generator) -> list[str]:
    """The texts in random order."""
    return [texts[i] for i in rng.permutation(len(texts))]


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
