"""Clean and corrupted texts, paired within scenarios, as one model sees them.

Clean is a scenario's text with label 1, corrupted its text with label 0: prompts, never models. What a unit (scenario, or
cluster of scenarios) shows is the mean over its pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from empathy_probes.concepts import Concept
from empathy_probes.errors import InputError
from empathy_probes.extraction import check_prompts
from empathy_probes.models import Model
from empathy_probes.prompts import RenderedPrompt, Style, outside_messages, render, style_of
from empathy_probes.readouts import Asked, ask, check_length, has_readout, with_readout
from empathy_probes.stimuli import ReadoutSpec, StimulusSet, stimuli_from_rows


@dataclass(frozen=True)
class TextPairs:
    """The clean (label 1) and the corrupted (label 0) texts of one concept, paired within scenarios, as a model sees them."""

    asked: Asked
    clean: tuple[int, ...]
    """Item of every pair."""
    corrupted: tuple[int, ...]
    scenarios: tuple[str, ...]
    """Of every pair."""
    units: tuple[str, ...]
    """Of every pair: its cluster where there is one, else its scenario."""
    outside: tuple[tuple[int, ...], ...] | None
    """Per item the tokens that a chat template put around the messages; None for plain text."""

    def sides(self, direction: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Items that activations are taken from, and items that they are put into."""
        return (self.clean, self.corrupted) if direction == "denoise" else (self.corrupted, self.clean)

    @property
    def lengths(self) -> tuple[tuple[int, int], ...]:
        """Tokens of both prompts of every pair."""
        prompts = self.asked.prompts
        return tuple(
            (len(prompts[a]), len(prompts[b])) for a, b in zip(self.clean, self.corrupted, strict=True)
        )


def pair_texts(
    asked: Asked, stimuli: StimulusSet, outside: tuple[tuple[int, ...], ...] | None = None
) -> TextPairs:
    """Pair the texts of each scenario.

    In order where it has as many of one label as of the other, else each with each: then the mean over pairs is that over texts.

    Raises:
        InputError: labels are not 0 and 1.
    """
    if stimuli.kind != "binary":
        raise InputError(
            f"concept '{stimuli.concept}' has {stimuli.kind} labels, expected two labels: patching needs a clean and a corrupted "
            "text; ask for one of its contrasts instead"
        )
    sides: dict[str, tuple[list[int], list[int]]] = {}
    for i, item in enumerate(stimuli.items):
        sides.setdefault(item.scenario, ([], []))[int(item.label != 1)].append(i)
    pairs = [
        (scenario, a, b)
        for scenario, (ones, zeros) in sides.items()
        for a, b in (
            zip(ones, zeros, strict=True)
            if len(ones) == len(zeros)
            else [(a, b) for a in ones for b in zeros]
        )
    ]
    scenarios, clean, corrupted = zip(*pairs, strict=True)
    units = tuple(stimuli.items[a].unit for a in clean)
    return TextPairs(asked, clean, corrupted, scenarios, units, outside)


def prepare_pairs(
    model: Model, concept: Concept, readout: ReadoutSpec | None, template: str
) -> tuple[Concept, TextPairs]:
    """Render one concept for one model and pair its texts.

    Args:
        model: whose tokenizer renders.
        concept: with a readout, unless one is given.
        readout: for all its texts.
        template: raw or chat.

    Raises:
        InputError: an unknown template, no readout, what is none, or a prompt that the model cannot take.
    """
    style = style_of(template)
    if not isinstance(readout, ReadoutSpec | None):
        raise InputError(
            f"readout got {readout!r}, expected a ReadoutSpec; pass one such as ReadoutSpec('answers', (' great',), (' awful',))"
        )
    stimuli = concept.stimuli if readout is None else with_readout(concept.stimuli, readout)
    if not has_readout(stimuli):
        raise InputError(
            f"concept '{concept.name}' has no readout: patching needs a question after each text; give one as readout="
        )
    if stimuli.n_scenarios < 2:
        raise InputError(
            f"concept '{concept.name}' has {stimuli.n_scenarios} scenario, expected at least 2: one alone has no interval; add scenarios"
        )
    prompts = render(model.tokenizer, stimuli, style, concept.speaker)
    check_prompts(model, prompts, concept.name)
    asked = ask(model.tokenizer, stimuli, prompts, style)
    check_length(model, asked)
    return replace(concept, stimuli=stimuli), pair_texts(
        asked, stimuli, around(model.tokenizer, stimuli, prompts, concept.speaker, style)
    )


def around(
    tokenizer: Any, stimuli: StimulusSet, prompts: Sequence[RenderedPrompt], speaker: str, style: Style
) -> tuple[tuple[int, ...], ...] | None:
    """The template's own tokens; None for plain text."""
    return None if style == "raw" else outside_messages(tokenizer, stimuli, prompts, speaker)


def as_concepts(
    given: Concept | Sequence[Concept] | Sequence[tuple[str, str]],
) -> tuple[Concept, ...]:
    """Concepts as they are; pairs of a clean and a corrupted text as one concept named `pairs`.

    Raises:
        InputError: fewer than two pairs, which have no interval, or a pair that is not two texts.
    """
    if isinstance(given, Concept):
        return (given,)
    concepts = [entry for entry in given if isinstance(entry, Concept)]
    if concepts and len(concepts) == len(given):
        return tuple(concepts)
    pairs = [entry for entry in given if not isinstance(entry, Concept)]
    if concepts or len(pairs) < 2:
        raise InputError(
            f"{len(pairs)} pairs of texts and {len(concepts)} concepts were given, expected concepts or at least 2 pairs (clean, "
            "corrupted); give more"
        )
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise InputError(f"pairs got {pair!r}, expected two texts (clean, corrupted); give two")
    rows = [
        {"id": f"{i}-{label}", "scenario": f"pair-{i}", "text": text, "label": label}
        for i, pair in enumerate(pairs)
        for text, label in zip(pair, (1, 0), strict=True)
    ]
    return (Concept("pairs", "target", "", "", "user", "pairs of texts", stimuli_from_rows(rows, "pairs")),)


def unit_means(
    values: Float[np.ndarray, "*axes pair"], scenarios: Sequence[str], units: Sequence[str]
) -> Float[np.ndarray, "*axes unit"]:
    """Mean over the pairs of each scenario, then over the scenarios of each unit, units in order of appearance."""
    pairs, home = Counter(scenarios), dict(zip(scenarios, units, strict=True))
    shared = Counter(home.values())
    place = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    weight = np.zeros((len(scenarios), len(place)))
    for pair, (scenario, unit) in enumerate(zip(scenarios, units, strict=True)):
        weight[pair, place[unit]] = 1 / pairs[scenario] / shared[unit]
    return values @ weight
