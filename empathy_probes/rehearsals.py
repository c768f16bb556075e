"""What a whole study says of a pair whose truth is known, over many samples of its scenarios.

Every stage runs once on a population of scenarios of one concept and its controls. A sample of n of them is then judged as a
study judges it: where stitching places the loss, what became of coupling and gain, from which layer on a transplant repairs,
and the verdict of the ledger. Samples of one population share scenarios, so their rates say how steady the instrument is on this
pair; how much pairs differ shows between bases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from empathy_probes.attenuation import measure
from empathy_probes.concepts import Concept
from empathy_probes.contrasts import LayerSet
from empathy_probes.decisions import judge
from empathy_probes.design import Design, Settings, design_study
from empathy_probes.expression import Coupling, couple
from empathy_probes.extraction import extract
from empathy_probes.gains import Gain
from empathy_probes.ledger import encoded_overall
from empathy_probes.metrics import Target
from empathy_probes.pairs import ModelPair
from empathy_probes.prompts import render
from empathy_probes.readouts import with_readout
from empathy_probes.redraws import Population, check_size, contrasts_of, sample_of
from empathy_probes.scorecard import VERDICT_SAID, Row, proportion_row
from empathy_probes.steering import dose_response_design
from empathy_probes.stitching import Stitching, stitch_design
from empathy_probes.store import Store
from empathy_probes.transplants import ORDERS, VARIANTS, TransplantedConcept, Transplants, transplant_design
from empathy_probes.verdicts import Encoded, Used, reach_verdict, use_word

DOSES = (-0.1, 0.0, 0.1)
NOWHERE = "nowhere"
RIGHT = Target(least=0.90)


def expected_words(family: str, layer: int | None) -> dict[str, str]:
    """What a study should say of a twin, by question; nothing of families whose answer is only looked at."""
    lost = {"encode": "attenuated", "use": f"lost at {layer}", "express": "attenuated", "verdict": "erased"}
    repaired = {order: f"at {layer}" for order in ORDERS} | {
        f"random_{order}": "does not repair" for order in ORDERS
    }
    kept = {"encode": "equivalent", "use": "kept", "express": "equivalent", "gain": "equivalent"}
    unused = {"encode": "equivalent", "express": "attenuated", "gain": "attenuated"}
    return {
        "identical": {**kept, "verdict": "preserved"},
        "rescaled": {**kept, "verdict": "preserved"},
        "rotated": {**kept, "verdict": "rotated"},
        "planted": {**lost, **repaired},
        # Nothing is moved out of a model that has no direction of the concept left.
        "erased": {
            **lost,
            **{question: word for question, word in repaired.items() if "base_into" in question},
        },
        # A push before its block is weakened there like the concept itself, so nothing is expected of its gain.
        "local": {"encode": "attenuated", "use": "kept", "express": "equivalent", "verdict": "local"},
        "unread": {**unused, "use": f"lost at {layer}", "verdict": "encoded_unread"},
        "unsaid": {**unused, "use": "lost at head", "verdict": "used_unsaid"},
    }.get(family, {})


@dataclass(frozen=True)
class Rehearsal:
    """All stages on the whole population of one pair; the concept it is about is the only target."""

    population: Population
    coupling: Coupling
    stitching: Stitching
    gain: Gain
    transplants: Transplants
    rotated: bool
    """Whether the base's probe fails in the aligned model and the neutral-text map repairs it; of the population only."""

    @property
    def n(self) -> int:
        """Scenarios of every concept."""
        return min(sample.n for sample in self.population.samples)


def rehearse(
    pair: ModelPair,
    target: Concept,
    controls: Sequence[Concept],
    neutral: Sequence[str],
    store: Store,
    steered: Sequence[int],
    settings: Settings | None = None,
) -> Rehearsal:
    """Run every stage once.

    Args:
        pair: the twin and its base.
        target: the concept, with a readout; as many scenarios as every control.
        controls: with readouts, six or more.
        neutral: texts of no concept.
        store: keeps activations and answers.
        steered: blocks at which the gain is measured.
        settings: margin, draws and seed.
    """
    settings = settings or Settings()
    design = design_study(pair, [target], controls, template="raw", neutral=tuple(neutral))
    alone = replace(design, concepts=tuple(c for c in design.concepts if c.role == "target"))
    silent = tuple(
        replace(c, stimuli=with_readout(c.stimuli, None)) if c.role == "control" else c
        for c in design.concepts
    )
    (measured,) = measure(alone, settings, store).select("raw", "resid_post", "target")
    blocks = np.array(measured.layers) >= 0
    turned = measured.transfer_fails(mapped=False) & ~measured.transfer_fails(mapped=True) & blocks
    return Rehearsal(
        _population(design, store),
        couple(design, settings, store),
        stitch_design(alone, settings, store),
        dose_response_design(
            replace(design, concepts=silent, layers=(-1, *steered)), settings, store, doses=DOSES
        ),
        transplant_design(alone, settings, store),
        bool(turned.any()),
    )


def _population(design: Design, store: Store) -> Population:
    layers = tuple(layer for layer in design.layers if layer >= 0)
    samples = []
    for concept in design.concepts:
        acts = [
            extract(
                model,
                render(model.tokenizer, concept.stimuli, "raw", concept.speaker),
                ("resid_post",),
                layers,
                store,
            )
            for model in design.pair.models
        ]
        samples.append(sample_of(concept, [found["resid_post"] for found in acts]))
    return Population(layers, tuple(samples), design.pair.identical)


def speak(rehearsal: Rehearsal, n: int, redraws: int, seed: int = 0) -> dict[str, tuple[str, ...]]:
    """What is said of `redraws` samples of n scenarios, by question.

    Questions: encode, use, express, gain, verdict, and the frontier of a transplant in both orders (`base_into_aligned`,
    `aligned_into_base`): the first block from which the concept's component repairs, or whether random ones do (`random_…`).

    Raises:
        InputError: fewer than 2 n scenarios.
    """
    check_size(rehearsal.n, n)
    found: dict[str, list[str]] = {}
    for r in range(redraws):
        rng = np.random.default_rng([seed, n, r])
        for question, word in _speak_once(
            rehearsal, rng.choice(rehearsal.n, n, replace=False), seed + r
        ).items():
            found.setdefault(question, []).append(word)
    return {question: tuple(words) for question, words in found.items()}


def _speak_once(rehearsal: Rehearsal, chosen: Int[np.ndarray, " n"], seed: int) -> dict[str, str]:
    people, n_layers = rehearsal.population, rehearsal.stitching.n_layers
    settings = replace(rehearsal.stitching.settings, seed=seed)
    compared = [contrasts_of(sample, chosen[None], people)[0] for sample in people.samples]
    (judged,) = judge(compared[:1], compared[1:], margin=settings.margin, draws=settings.draws, seed=seed)
    decision, _ = encoded_overall(judged)
    alone = compared[0].attenuation
    drifted = bool(((alone.lower > settings.margin) | (alone.upper < -settings.margin)).any())
    specific = "specific" in judged.headline
    encoded = Encoded(decision, specific, judged.onset.lower, specific and drifted, rehearsal.rotated)

    stitched = rehearsal.stitching.concepts[0]
    units = tuple(stitched.units[i] for i in chosen)
    stitched = replace(stitched, units=units, coupling=stitched.coupling[..., chosen])
    coupling = replace(
        rehearsal.coupling,
        settings=settings,
        concepts=tuple(
            replace(c, units=tuple(c.units[i] for i in chosen), coupling=c.coupling[:, chosen])
            for c in rehearsal.coupling.concepts
        ),
    )
    steered = rehearsal.gain.concepts[0]
    steered = replace(
        steered, units=units, readouts=steered.readouts[..., chosen], coupling=steered.coupling[:, chosen],
        tangents=steered.tangents[..., chosen],
    )  # fmt: skip
    gain = replace(rehearsal.gain, settings=settings, concepts=(steered,)).decision(steered.concept, "raw")
    used = Used(replace(rehearsal.stitching, settings=settings, concepts=(stitched,)).loss(stitched), gain)
    express = coupling.decision(coupling.select("raw", "target")[0])
    return {
        "encode": decision or "undecided",
        "use": use_word(used, n_layers),
        "express": express or "undecided",
        "gain": gain or "undecided",
        "verdict": reach_verdict(encoded, used, express, n_layers).word,
        **_repairs(replace(rehearsal.transplants, settings=settings), chosen),
    }


def _repairs(transplants: Transplants, chosen: Int[np.ndarray, " n"]) -> dict[str, str]:
    whole = transplants.concepts[0]
    part = replace(
        whole, units=tuple(whole.units[i] for i in chosen), own=whole.own[:, chosen], moved=whole.moved[..., chosen],
        random=whole.random[..., chosen],
    )  # fmt: skip
    words = {}
    for order, name in enumerate(ORDERS):
        words[name] = frontier_word(transplants.frontier(part, order, "read"))
        words[f"random_{name}"] = _random_word(transplants, part, order)
    return words


def frontier_word(frontier: LayerSet | None) -> str:
    """A set of layers in a word: `nothing to repair`, `nowhere`, `at 3`, `at 2-3`, or `at 3 or nowhere`."""
    if frontier is None:
        return "nothing to repair"
    if not frontier.members:
        return NOWHERE
    ends = dict.fromkeys((frontier.members[0], frontier.members[-1]))
    return f"at {'-'.join(map(str, ends))}{' or nowhere' * frontier.includes_none}"


def _random_word(transplants: Transplants, part: TransplantedConcept, order: int) -> str:
    """Whether random components of the same size are shown to repair more than the margin at any layer."""
    if not part.detected(order):
        return "nothing to repair"
    lower = transplants.band(part, order).lower[0, VARIANTS.index("random")]
    return "repairs" if (lower > transplants.settings.margin).any() else "does not repair"


def rehearsal_rows(
    cell: tuple[str, str, str, int], layer: int | None, words: Mapping[str, Sequence[str]]
) -> tuple[Row, ...]:
    """Rows of the scorecard: how often every question got the right word, and which verdicts were given.

    Args:
        cell: family, architecture, concept and n.
        layer: where it was planted.
        words: from `speak`, of all pairs of the cell.
    """
    asked: list[tuple[str, Sequence[str], str, Target | None]] = [
        (f"says_{question}", words[question], right, RIGHT)
        for question, right in expected_words(cell[0].split()[0], layer).items()
    ]
    asked += [
        (f"{VERDICT_SAID}{word}", words["verdict"], word, None) for word in sorted(set(words["verdict"]))
    ]
    rows = [
        proportion_row(*cell, metric, np.array([word == right for word in given], dtype=float), target)
        for metric, given, right, target in asked
    ]
    return tuple(rows)
