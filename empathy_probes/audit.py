"""The audit of stimuli: what gives a label away without any model, and what ties scenarios together.

A probe that reads a concept may read its texts' length, their difficulty or a word instead, and a scenario that recurs
lets it learn by heart across folds. So, for every concept: paired differences between the labels in words, in tokens of a
byte-level BPE and in Flesch's reading ease (mean over scenarios, t interval); AUROC of a bag of words and of runs of
2 to 5 characters, five folds grouped by scenario, mean over three draws of the folds; the nearest text of any other
scenario by TF-IDF cosine; sentences and skeletons that recur; and whether what is asked afterwards asks both labels alike.

Labels are compared as they are measured: 1 against 0, each scenario's highest grade against its lowest, or each category
against the rest (differences: the category that is furthest off; floors: the mean over categories). Turns that are the
same in all texts of a scenario are left out, as they cannot tell a label.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from empathy_probes.auroc import auroc
from empathy_probes.auroc_intervals import auroc_interval
from empathy_probes.coding import categories, contrast_codes, label_numbers
from empathy_probes.concepts import Concept, list_concepts, load_concept, load_neutral
from empathy_probes.errors import InputError
from empathy_probes.probes import N_FOLDS, count_words, counted_scores
from empathy_probes.stats import mean_interval
from empathy_probes.stimuli import StimulusSet

Verdict = Literal["ok", "explained", "fail"]
Sense = Literal["within", "at most", "at least"]
# Half a word, or one token, is less than the places at which two tokenizers cut the same text differ.
WORDS, TOKENS = 0.5, 1.0
# One band of Flesch's table (plain, fairly easy, ...) is ten points wide.
EASE = 10.0
# Above this a bag of words alone does what weak probes do.
FLOOR = 0.75
# Draws of the folds behind a floor: one draw moves a floor of 64 scenarios by about .02.
DRAWS = 3
# Texts of unrelated scenarios reach .49 in the shipped library; a text with one content word exchanged stays above .8.
DUPLICATE = 0.6
# Sentences of fewer words ("How do I put this?") recur in ordinary writing.
SENTENCE = 6
# Words of a skeleton, and the share of scenarios that may have one; ordinary writing stays below .08.
SKELETON = 5
SHARE = 0.1
MIN_SCENARIOS = 30.0
VOCABULARY = 4000
N_CUES = 5

WORD = re.compile(r"\w+(?:['’]\w+)*")
SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)]*\s+|\n")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    """As in `CHECKS`; the key under which a concept's TOML explains an exception."""
    verdict: Verdict
    value: float | None
    """None where there is nothing to measure, such as a readout that no text has."""
    lower: float | None
    """95 % interval over scenarios; None for counts and extremes, which have none."""
    upper: float | None
    bound: float
    sense: Sense
    """How the value has to lie to the bound; `within` means between -bound and bound."""
    unit: str
    found: str
    """What was found, in words."""
    explanation: str
    """Why it may be so, from the concept's TOML; empty unless the verdict is `explained`."""


@dataclass(frozen=True)
class Cue:
    """A word that gives a label away."""

    word: str
    label: str
    """The label on whose side it stands."""
    weight: float
    """Its ridge weight, on TF-IDF features and codes of -1 and 1."""
    here: int
    """Scenarios in which a text of this label has it."""
    there: int
    """Scenarios in which a text of the other label (or labels) has it."""


@dataclass(frozen=True)
class Audit:
    """All checks of one concept."""

    concept: str
    role: str
    mechanism: str
    dimension: str
    speaker: str
    n_scenarios: int
    digest: str
    checks: tuple[Check, ...]
    cues: tuple[Cue, ...]
    """The words with the largest ridge weights, for every label."""

    key = "audit"

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of its checks."""
        found = {check.verdict for check in self.checks}
        return "fail" if "fail" in found else "explained" if "explained" in found else "ok"

    def check(self, name: str) -> Check:
        """The check of that name."""
        return next(check for check in self.checks if check.name == name)

    def to_frame(self) -> Any:
        """One row per check."""
        import pandas as pd

        rows = [{"concept": self.concept, "role": self.role, "n_scenarios": self.n_scenarios} | vars(check) for check in self.checks]  # fmt: skip
        return pd.DataFrame(rows)

    def save(self, path: str | Path) -> None:
        """Write the audit as a record of this package."""
        from empathy_probes.store import save_record

        save_record(self, path)

    def _repr_html_(self) -> str:
        return str(self.to_frame()._repr_html_())


def audit_library() -> tuple[Audit, ...]:
    """Audit every shipped concept, each against all others and the neutral texts."""
    return audit_concepts(shipped_concepts())


@cache
def shipped_concepts() -> tuple[Concept, ...]:
    """All shipped concepts, read once."""
    return tuple(map(load_concept, list_concepts()))


def audit_concept(concept: Concept, others: Sequence[Concept] = ()) -> Audit:
    """Audit one concept; `others` are those in which none of its scenarios may recur."""
    return audit_concepts([concept], others)[0]


def audit_concepts(concepts: Sequence[Concept], others: Sequence[Concept] = ()) -> tuple[Audit, ...]:
    """Audit several concepts, each against the rest of them, `others` and the neutral texts.

    Raises:
        InputError: two concepts have one name, or one has too few scenarios for folds or explains a check that does not
            exist.
    """
    names = [concept.name for concept in concepts]
    for concept in concepts:
        if names.count(concept.name) > 1:
            raise InputError(
                f"the concept '{concept.name}' was given twice, expected one of each name; leave one out, or rename it"
            )
        unknown = [name for name in concept.exceptions if name not in CHECKS]
        if unknown:
            raise InputError(
                f"concept '{concept.name}' explains the checks {', '.join(unknown)}, expected names among "
                f"{', '.join(CHECKS)}; correct [exceptions]"
            )
        if concept.stimuli.n_scenarios < N_FOLDS:
            raise InputError(
                f"concept '{concept.name}' has {concept.stimuli.n_scenarios} scenarios, expected at least {N_FOLDS} for the "
                "folds of a lexical floor; write more"
            )
    # A concept of the same name is another version of it, or itself.
    company = _Company([*concepts, *(other for other in others if other.name not in names)])
    return tuple(_audit(concept, company) for concept in concepts)


def _audit(concept: Concept, company: _Company) -> Audit:
    sides = _compare_sides(concept.stimuli)
    checks = (
        _schema(concept), _labels(concept), _size(concept),
        _difference(concept, sides, "length_words", WORDS, "words"),
        _difference(concept, sides, "length_tokens", TOKENS, "tokens"),
        _difference(concept, sides, "reading", EASE, "points of reading ease"),
        _floor(concept, sides, "floor_words"), _floor(concept, sides, "floor_characters"),
        company.nearest(concept), company.recurrence(concept), _skeletons(concept), _readout(concept),
    )  # fmt: skip
    return Audit(
        concept.name, concept.role, concept.mechanism, concept.dimension, concept.speaker, concept.stimuli.n_scenarios,
        concept.digest, checks, _cues(sides),
    )  # fmt: skip


def _check(
    concept: Concept, name: str, value: float | None, bound: float, sense: Sense, unit: str, found: str,
    lower: float | None = None, upper: float | None = None,
) -> Check:  # fmt: skip
    good = value is None or LAWS[sense](value, bound)
    explanation = "" if good else concept.exceptions.get(name, "")
    verdict: Verdict = "ok" if good else "explained" if explanation else "fail"
    return Check(name, verdict, value, lower, upper, bound, sense, unit, found, explanation)


LAWS: dict[Sense, Callable[[float, float], bool]] = {
    "within": lambda value, bound: abs(value) <= bound,
    "at most": lambda value, bound: value <= bound,
    "at least": lambda value, bound: value >= bound,
}


# ---------------------------------------------------------------- what is compared


@dataclass(frozen=True)
class _Sides:
    """Texts and the labellings that are compared."""

    texts: tuple[str, ...]
    units: tuple[str, ...]
    codes: Float[np.ndarray, "contrast text"]
    names: tuple[tuple[str, str], ...]
    """Per contrast the labels coded 1 and 0."""


def _compare_sides(stimuli: StimulusSet) -> _Sides:
    labels = label_numbers(stimuli)
    texts, units = _told(stimuli), [item.unit for item in stimuli.items]
    if stimuli.kind == "categorical":
        names = tuple((name, "the others") for name in categories(stimuli))
        return _Sides(tuple(texts), tuple(units), contrast_codes(stimuli.kind, labels), names)
    rows, codes = [], []
    for members in _by_scenario(stimuli).values():
        top, bottom = labels[members].max(), labels[members].min()
        kept = [i for i in members if labels[i] in (top, bottom)]
        rows += kept
        codes += [float(labels[i] == top) for i in kept]
    high, low = (f"{label:g}" for label in (labels.max(), labels.min()))
    return _Sides(
        tuple(texts[i] for i in rows), tuple(units[i] for i in rows), np.array([codes]), ((high, low),)
    )


def _by_scenario(stimuli: StimulusSet) -> dict[str, list[int]]:
    scenarios: dict[str, list[int]] = {}
    for i, item in enumerate(stimuli.items):
        scenarios.setdefault(item.scenario, []).append(i)
    return scenarios


def _told(stimuli: StimulusSet) -> list[str]:
    """Every text without the turns that all texts of its scenario share."""
    told = [item.text for item in stimuli.items]
    for members in _by_scenario(stimuli).values():
        turns = [[message.content for message in stimuli.items[i].messages] for i in members]
        if len({len(each) for each in turns}) > 1:
            continue
        differ = [k for k, said in enumerate(zip(*turns, strict=True)) if len(set(said)) > 1]
        for i, each in zip(members, turns, strict=True):
            told[i] = "\n".join(each[k] for k in differ) or told[i]
    return told


# ---------------------------------------------------------------- form


def _schema(concept: Concept) -> Check:
    items = concept.stimuli.items
    faults = []
    known = {label if isinstance(label, str) else f"{label:g}" for label in {item.label for item in items}}
    if concept.labels and known != set(concept.labels):
        faults.append(f"labels {', '.join(sorted(known))}, but {', '.join(sorted(concept.labels))} are described")  # fmt: skip
    repeated = len(items) - len({item.text for item in items})
    if repeated:
        faults.append(f"{repeated} texts stand there more than once")
    described = "every label described" if concept.labels else "labels not described"
    found = "; ".join(faults) or f"{len(items)} texts, {described}, none twice"
    return _check(concept, "schema", float(len(faults)), 0.0, "at most", "faults", found)


def _labels(concept: Concept) -> Check:
    items = concept.stimuli.items
    everything = {item.label for item in items}
    held = [{items[i].label for i in members} for members in _by_scenario(concept.stimuli).values()]
    # Ratings on a fine scale: no scenario could hold them all, and the loader demands two.
    needed = len(everything) if concept.stimuli.kind != "graded" or everything in held else 2
    missing = sum(len(labels) < needed for labels in held)
    found = (
        f"{missing} of {len(held)} scenarios lack a label"
        if missing
        else f"{needed} labels in every scenario"
    )
    return _check(concept, "labels", float(missing), 0.0, "at most", "scenarios", found)


def _size(concept: Concept) -> Check:
    n = concept.stimuli.n_scenarios
    found = f"{n} scenarios" + (", fewer than 60: wide intervals" if MIN_SCENARIOS <= n < 60 else "")
    return _check(concept, "size", float(n), MIN_SCENARIOS, "at least", "scenarios", found)


def _readout(concept: Concept) -> Check:
    items, unit = concept.stimuli.items, "faults"
    asked = {item.readout for item in items} - {None}
    if not asked:
        return _check(
            concept, "readout", None, 0.0, "at most", unit, "no readout: only the encode stage can run"
        )
    silent = sum(item.readout is None for item in items)
    by_scenario = _by_scenario(concept.stimuli).values()
    uneven = sum(len({items[i].readout for i in members}) > 1 for members in by_scenario)
    told = [spec for spec in asked if spec is not None and spec.kind == "continuations"]
    longer = sum(abs(len(s.expressive[0].split()) - len(s.attenuated[0].split())) > 1 for s in told)
    faults = [
        f"{count} {what}"
        for count, what in (
            (silent, "texts have none"),
            (uneven, "scenarios ask their texts differently"),
            (longer, "pairs of continuations differ by more than one word"),
            (len(asked) if told and len(asked) < 4 else 0, "wordings, expected four or more"),
        )
        if count
    ]
    found = "; ".join(faults) or f"{len(asked)} wordings, each the same after all texts of a scenario"
    return _check(concept, "readout", float(len(faults)), 0.0, "at most", unit, found)


# ---------------------------------------------------------------- length and reading level


def _difference(concept: Concept, sides: _Sides, name: str, bound: float, unit: str) -> Check:
    values = MEASURES[name](sides.texts)
    curves = [mean_interval(_paired(values, code, sides.units)) for code in sides.codes]
    worst = max(range(len(curves)), key=lambda i: abs(float(curves[i].value)))
    curve, (one, zero) = curves[worst], sides.names[worst]
    return _check(
        concept, name, float(curve.value), bound, "within", unit, f"{one} minus {zero}, mean over scenarios",
        float(curve.lower), float(curve.upper),
    )  # fmt: skip


def _paired(
    values: Float[np.ndarray, " text"], codes: Float[np.ndarray, " text"], units: Sequence[str]
) -> Float[np.ndarray, " unit"]:
    """Per unit the mean of texts coded 1 less the mean of texts coded 0; units that lack one are left out."""
    members = np.array(units)
    found = []
    for unit in dict.fromkeys(units):
        one, zero = (values[(members == unit) & (codes == side)] for side in (1, 0))
        if len(one) and len(zero):
            found.append(one.mean() - zero.mean())
    return np.array(found)


def _words(texts: Sequence[str]) -> Float[np.ndarray, " text"]:
    return np.array([float(len(text.split())) for text in texts])


def _tokens(texts: Sequence[str]) -> Float[np.ndarray, " text"]:
    return np.array([float(len(code.ids)) for code in _tokenizer().encode_batch(list(texts))])


@cache
def _tokenizer() -> Any:
    """A byte-level BPE of 4,000 tokens, trained on the shipped and the neutral texts: 1.2 tokens per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    shipped = [item.text for concept in shipped_concepts() for item in concept.stimuli.items]
    tokenizer.train_from_iterator([*shipped, *load_neutral()], trainer)
    return tokenizer


def reading_ease(text: str) -> float:
    """Flesch (1948): 206.835 - 1.015 words per sentence - 84.6 syllables per word; higher is easier.

    >>> round(reading_ease("The cat sat on the mat."))
    116
    """
    words = WORD.findall(text)
    if not words:
        return 206.835  # neither words nor syllables: the formula's constant
    sentences = max(1, sum(bool(WORD.search(part)) for part in SENTENCE_END.split(text)))
    return 206.835 - 1.015 * len(words) / sentences - 84.6 * sum(map(syllables, words)) / len(words)


def syllables(word: str) -> int:
    """Groups of vowels, without a silent e at the end.

    >>> [syllables(word) for word in ("house", "little", "walked", "wanted", "reassurance")]
    [1, 2, 1, 2, 3]
    """
    plain = re.sub(r"(?<=[a-z])'.*|’.*", "", word.lower())
    plain = re.sub(r"(?<![aeiouytd])ed$|(?<![aeiouyl])e$|(?<=[aeiouy]l)e$", "", plain)
    return max(1, len(re.findall(r"[aeiouy]+", plain)))


def _ease(texts: Sequence[str]) -> Float[np.ndarray, " text"]:
    return np.array([reading_ease(text) for text in texts])


MEASURES = {"length_words": _words, "length_tokens": _tokens, "reading": _ease}


# ---------------------------------------------------------------- lexical floors


def _floor(concept: Concept, sides: _Sides, name: str) -> Check:
    codes = sides.codes.astype(int)
    counts, _ = count_words(sides.texts, characters=name == "floor_characters")
    several, areas = len(codes) > 1, []
    for seed in range(DRAWS):
        # Texts whose known words are the same tie; unrounded, the last bit of a sum would order them.
        scores = counted_scores(counts, sides.codes, sides.units, seed).round(9)
        mean = auroc_interval(
            scores[None] if several else scores, codes if several else codes[0], sides.units
        )
        each = [float(auroc(scores[i][None], code)[0]) for i, code in enumerate(codes)]
        areas.append([*(float(x[0]) for x in (mean.value, mean.lower, mean.upper)), *each])
    value, lower, upper, *each = np.mean(areas, axis=0).tolist()
    found = f"{sides.names[0][0]} against {sides.names[0][1]}"
    if several:
        best = int(np.argmax(each))
        found = f"mean over {len(each)} categories, each against the others; highest {sides.names[best][0]}, {each[best]:.2f}"
    return _check(concept, name, value, FLOOR, "at most", "AUROC", found, lower, upper)


def _cues(sides: _Sides) -> tuple[Cue, ...]:
    """Largest weights of the same ridge, fitted on all texts."""
    from sklearn.feature_extraction.text import TfidfTransformer

    counts, words = count_words(sides.texts)
    features = TfidfTransformer(sublinear_tf=True).fit_transform(counts)
    gram = (features @ features.T).toarray()
    gram = gram - gram.mean(0) - gram.mean(1, keepdims=True) + gram.mean()
    aim = 2 * sides.codes.T - 1
    shares = np.linalg.solve(gram + np.eye(len(gram)) * np.trace(gram) / len(gram), aim - aim.mean(0))
    weights = features.T @ shares
    there = counts.toarray() > 0
    found = []
    for c, names in enumerate(sides.names):
        for side in (1, 0) if len(sides.names) == 1 else (1,):
            signed = weights[:, c] * (1 if side else -1)
            for w in np.argsort(-signed, kind="stable")[: N_CUES if len(sides.names) == 1 else 2]:
                with_it = [
                    len({u for u, code, has in zip(sides.units, sides.codes[c], there[:, w], strict=True) if has and code == k})
                    for k in (side, 1 - side)
                ]  # fmt: skip
                found.append(Cue(words[w], names[0 if side else 1], float(signed[w]), *with_it))
    return tuple(found)


# ---------------------------------------------------------------- what recurs


class _Company:
    """All texts that are audited together, and the neutral ones: where something may recur."""

    def __init__(self, concepts: Sequence[Concept]) -> None:
        from sklearn.feature_extraction.text import TfidfTransformer

        items = [(concept.name, item) for concept in concepts for item in concept.stimuli.items]
        neutral = load_neutral()
        self.texts = [item.text for _, item in items] + list(neutral)
        self.names = [f"{name}, {item.unit}" for name, item in items] + [f"neutral text {i}" for i in range(len(neutral))]  # fmt: skip
        counts, _ = count_words(self.texts)
        self.features = TfidfTransformer(sublinear_tf=True).fit_transform(counts)
        self.rows = {
            concept.name: [i for i, (name, _) in enumerate(items) if name == concept.name]
            for concept in concepts
        }
        self.sentences: dict[str, set[str]] = {}
        for text, name in zip(self.texts, self.names, strict=True):
            for sentence in _sentences(text):
                self.sentences.setdefault(sentence, set()).add(name)

    def nearest(self, concept: Concept) -> Check:
        """The largest cosine of one of its texts with a text of any other scenario."""
        rows = self.rows[concept.name]
        cosines = (self.features[rows] @ self.features.T).toarray()
        place = {name: i for i, name in enumerate(dict.fromkeys(self.names))}
        scenario = np.array([place[name] for name in self.names])
        cosines[scenario[rows][:, None] == scenario] = -1
        mine, other = np.unravel_index(int(cosines.argmax()), cosines.shape)
        found = f"{concept.stimuli.items[int(mine)].id} and a text of {self.names[int(other)]}"
        return _check(concept, "duplicates", float(cosines.max()), DUPLICATE, "at most", "cosine", found)

    def recurrence(self, concept: Concept) -> Check:
        """Scenarios that share a sentence with another scenario, of this concept or any other."""
        shared: dict[str, tuple[str, str]] = {}
        for i in self.rows[concept.name]:
            for sentence in _sentences(self.texts[i]):
                elsewhere = self.sentences[sentence] - {self.names[i]}
                if elsewhere:
                    shared.setdefault(self.names[i], (sentence, min(elsewhere)))
        found = f"no sentence of {SENTENCE} words or more stands in another scenario"
        if shared:
            mine, (sentence, other) = next(iter(shared.items()))
            found = f"'{sentence}' in {mine} and in {other}"
        return _check(concept, "recurrence", float(len(shared)), 0.0, "at most", "scenarios", found)


def _sentences(text: str) -> Iterable[str]:
    for sentence in SENTENCE_END.split(text.lower()):
        words = WORD.findall(sentence)
        if len(words) >= SENTENCE:
            yield " ".join(words)


def _skeletons(concept: Concept) -> Check:
    """The share of scenarios with the commonest five words in a row, one of the inner three left open."""
    places: dict[str, set[str]] = {}
    for text, item in zip(_told(concept.stimuli), concept.stimuli.items, strict=True):
        words = WORD.findall(text.lower())
        for start in range(len(words) - SKELETON + 1):
            for gap in range(1, SKELETON - 1):
                run = words[start : start + SKELETON]
                run[gap] = "…"
                places.setdefault(" ".join(run), set()).add(item.unit)
    if not places:
        return _check(concept, "skeletons", 0.0, SHARE, "at most", "of scenarios", "no text has five words")
    skeleton = max(places, key=lambda run: (len(places[run]), run))
    share = len(places[skeleton]) / concept.stimuli.n_scenarios
    return _check(concept, "skeletons", share, SHARE, "at most", "of scenarios", f"'{skeleton}'")


CHECKS = (
    "schema", "labels", "size", "length_words", "length_tokens", "reading", "floor_words", "floor_characters",
    "duplicates", "recurrence", "skeletons", "readout",
)  # fmt: skip
