"""What a scorecard's samples are drawn from: all texts of the grammar's concepts, run once through both models of a twin."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from empathy_probes.activations import Activations
from empathy_probes.concepts import Concept
from empathy_probes.design import neutral_set
from empathy_probes.extraction import extract
from empathy_probes.grammar import CONTROLS, TARGETS, neutral_texts
from empathy_probes.metrics import EXACT
from empathy_probes.models import Model
from empathy_probes.pairs import ModelPair
from empathy_probes.phantoms import load_phantom_concepts
from empathy_probes.planting import READ_AT, list_bases, open_twin
from empathy_probes.prompts import render
from empathy_probes.redraws import Population, sample_of
from empathy_probes.rehearsals import Rehearsal, rehearse
from empathy_probes.secondary import Exhibit
from empathy_probes.store import Store, open_store

SIZES = (40, 100, 300)
POPULATION_SEED = 50_000
"""Keeps the scenarios apart from those that twins are made with and from those of truth.json."""
NEUTRAL_POPULATION = 4000
REHEARSED_NEUTRAL = 320


@dataclass(frozen=True)
class Twin:
    """One pair of the scorecard."""

    base: str
    """Name of the phantom base, such as llama-0."""
    family: str
    concept: str | None = None
    layer: int | None = None
    keep: float | None = None

    @property
    def architecture(self) -> str:
        """What kind of model the base is."""
        return self.base.rsplit("-", 1)[0]

    @property
    def samples(self) -> int:
        """Added to the seed of its samples: redraws of two bases, counted together, must be of other scenarios."""
        return 10_000 * int(self.base.rsplit("-", 1)[1])

    @property
    def read(self) -> str:
        """Word at which its texts are read, if not at their end."""
        return READ_AT.get(self.family, "")

    @property
    def noise(self) -> float:
        """Factor of nuisance and doubt: a word before the end carries a fifth as much of a concept (docs/scorecard)."""
        return 0.2 if self.read else 1.0

    @property
    def key(self) -> str:
        """Names its files."""
        parts = [self.base, self.family, self.concept, self.layer, self.keep]
        return "_".join(str(part) for part in parts if part is not None)

    def open(self, phantoms: str | Path | None = None) -> ModelPair:
        """Make it, of a shipped base or of one in this folder."""
        return open_twin(list_bases(phantoms)[self.base], self.family, self.concept, self.layer, self.keep)

    def place(self, n_layers: int) -> int:
        """The block it is planted in, or the middle one."""
        return n_layers // 2 if self.layer is None else self.layer


@dataclass(frozen=True)
class Options:
    """What decides a scorecard's numbers, besides the weights."""

    twins: tuple[Twin, ...]
    sizes: tuple[int, ...] = SIZES
    population: int = 1500
    """Scenarios of the concept a twin is about (or of the first target) that samples are drawn from."""
    others: int = 640
    """Scenarios of every other concept."""
    redraws: int = 1000
    """Per cell, shared out among its twins; fewer in proportion where n is over 100, at equal cost."""
    nuisance: float = 0.5
    """Probability that anything else differs between the two texts of a scenario."""
    doubt: float = 0.2
    """Probability that a text shows a label drawn at random."""
    seed: int = 0
    attack_redraws: int = 0
    """Per attack and ablation; none for a quick scorecard."""
    measure_redraws: int = 0
    """Of the secondary measures, per cell and n up to 100; none for a quick scorecard."""
    rehearsal_redraws: int = 0
    """Of whole studies with all stages, per twin of `REHEARSED` and n up to 100; none for a quick scorecard."""
    rehearsal_population: int = 200
    """Scenarios of the concept and of each control that these are drawn from."""


def population(
    twin: Twin,
    options: Options,
    phantoms: str | Path | None = None,
    frame: str = "",
    bases: Store | None = None,
) -> Population:
    """Run all scenarios of every concept of the grammar through both models of a twin.

    `frame` is put before every text that the aligned model reads; `bases` keeps what a base computes for its other twins.
    """
    pair = twin.open(phantoms)
    layers = tuple(range(pair.base.n_layers))
    first = twin.concept or TARGETS[0]
    # Where both models compute the same, truth is exact and nothing is gained by drawing from more.
    many = options.others if twin.family in EXACT else options.population
    drawn = _drawn(twin, options)
    targets, controls = _concepts(options.others, *drawn, read=twin.read)
    if many > options.others:
        more = _concepts(many, *drawn, (first,), twin.read)
        targets = tuple(more[0][0] if concept.name == first else concept for concept in targets)
    samples = []
    for concept in (*targets, *controls):
        acts = []
        for model in pair.models:
            asked = concept
            if frame and model is pair.aligned:
                framed = tuple(replace(item, text=frame + item.text) for item in concept.stimuli.items)
                asked = replace(concept, stimuli=replace(concept.stimuli, items=framed))
            acts.append(_acts(model, asked, layers, twin.key, bases if model is pair.base else None))
        samples.append(sample_of(concept, acts))
    return Population(layers, tuple(samples), pair.identical and not frame)


def exhibit(
    twin: Twin, options: Options, phantoms: str | Path | None = None, bases: Store | None = None
) -> Exhibit:
    """The concept a twin is about (or the first target) at the block it is planted in (or the middle one)."""
    pair = twin.open(phantoms)
    layer = twin.place(pair.base.n_layers)
    drawn, names = _drawn(twin, options), (twin.concept or TARGETS[0],)
    concept = _concepts(options.population, *drawn, names, twin.read)[0][0]
    neutral = neutral_set(neutral_texts(NEUTRAL_POPULATION, drawn[0]), concept)
    base, aligned = (
        [_acts(model, asked, (layer,), twin.key, kept) for asked in (concept, neutral)]
        for model, kept in ((pair.base, bases), (pair.aligned, None))
    )
    texts, others = zip(base, aligned, strict=True)
    return Exhibit(concept, texts, others, pair.identical)


def rehearsal(twin: Twin, options: Options, phantoms: str | Path | None = None) -> Rehearsal:
    """Both models of a twin with all that every stage of a study asks of them: whole studies are drawn from it."""
    pair = twin.open(phantoms)
    names = (twin.concept or TARGETS[0], *CONTROLS)
    (target,), controls = load_phantom_concepts(
        options.rehearsal_population, *_drawn(twin, options), names, twin.read
    )
    store = open_store(f"memory://rehearsal/{twin.key}/{os.getpid()}")
    layer = twin.place(pair.base.n_layers)
    neutral = neutral_texts(REHEARSED_NEUTRAL, options.seed + POPULATION_SEED)
    held = rehearse(pair, target, controls, neutral, store, sorted({1, layer}))
    store.clear()
    return held


def _drawn(twin: Twin, options: Options) -> tuple[int, float, float]:
    """Seed, nuisance and doubt of its texts."""
    return options.seed + POPULATION_SEED, options.nuisance * twin.noise, options.doubt * twin.noise


# Most twins of a run read the same texts.
_concepts = lru_cache(maxsize=8)(load_phantom_concepts)


def _acts(
    model: Model, concept: Concept, layers: tuple[int, ...], key: str, kept: Store | None = None
) -> Activations:
    # A twin's activations are used once, and held in memory only as long as that; `kept` holds those of the bases.
    store = kept or open_store(f"memory://calibration/{key}/{os.getpid()}")
    prompts = render(model.tokenizer, concept.stimuli, "raw", concept.speaker)
    acts = extract(model, prompts, ("resid_post",), layers, store)["resid_post"]
    if kept is None:
        store.clear()
    return acts
