"""Which questions each stage of a study asks, and what kept one from being asked.

A question is one entry: the key of its result, what would keep a design from it, and the verb that answers it. `encode` is
always asked, because every verdict needs it. The other stages need concepts with a readout; without one they are left out
and the study says so, while a model that cannot be continued from a state is refused before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from empathy_probes import __version__
from empathy_probes.ablation import Ablation
from empathy_probes.attenuation import TYPES as FINDING_TYPES
from empathy_probes.attenuation import Finding, measure
from empathy_probes.attribution import attribute_design
from empathy_probes.design import Design, Settings, describe_design
from empathy_probes.errors import InputError
from empathy_probes.expression import CoupledConcept, Coupling, couple
from empathy_probes.gains import TYPES as GAIN_TYPES
from empathy_probes.gains import Gain
from empathy_probes.gradients import TYPES as ESTIMATE_TYPES
from empathy_probes.gradients import EstimatedPatching
from empathy_probes.patching import TYPES as PATCHING_TYPES
from empathy_probes.patching import Patching, patch_design
from empathy_probes.readouts import ask_design, has_readout, with_readout
from empathy_probes.steering import dose_response_design, spread_layers
from empathy_probes.stitching import StitchedConcept, Stitching, check_replay, stitch_design
from empathy_probes.store import Store, digest_of, load_record
from empathy_probes.transplants import TYPES as TRANSPLANT_TYPES
from empathy_probes.transplants import Transplants
from empathy_probes.trends import TYPES as TREND_TYPES
from empathy_probes.writes import TYPES as ATTRIBUTION_TYPES
from empathy_probes.writes import Attribution

STAGES = ("encode", "use", "express")
PATCHED_LAYERS = 8
STEERED_LAYERS, STEERED_DOSES = 3, (-0.5, -0.1, 0.0, 0.1, 0.5)


@dataclass(frozen=True)
class Question:
    """One question a stage asks."""

    key: str
    """Of its result, and the stem of its table."""
    stage: str
    answer: Callable[[Design, Settings, Store], Any]
    hindrance: Callable[[Design], str | None] = lambda design: None
    """Why this design cannot be asked it, in words for the report; None where it can."""


def _targets(design: Design) -> Design:
    """The same without controls: what is asked of single components needs none."""
    return replace(design, concepts=tuple(c for c in design.concepts if c.role == "target"))


def _attribute(design: Design, settings: Settings, store: Store) -> Attribution:
    # Total effects ablate every component in turn: a notebook's question, not every study's.
    return attribute_design(_targets(design), settings, store, total_effects=False)


def _steer(design: Design, settings: Settings, store: Store) -> Gain:
    # Controls lend their directions, and have no curves of their own; few layers and doses, as every cell is a run.
    silent = tuple(
        replace(c, stimuli=with_readout(c.stimuli, None)) if c.role == "control" else c
        for c in design.concepts
    )
    blocks = [layer for layer in design.layers if layer >= 0]
    layers = tuple(blocks[i] for i in spread_layers(len(blocks), STEERED_LAYERS))
    asked = replace(design, concepts=silent, layers=(-1, *layers))
    return dose_response_design(asked, settings, store, doses=STEERED_DOSES)


def _patch(design: Design, settings: Settings, store: Store) -> Patching:
    blocks = [layer for layer in design.layers if layer >= 0]
    layers = tuple(blocks[i] for i in spread_layers(len(blocks), PATCHED_LAYERS))
    return patch_design(replace(design, layers=(-1, *layers), components=("resid_post",)), settings, store)


def _one_sided(design: Design) -> str | None:
    if any(c.stimuli.kind == "binary" and has_readout(c.stimuli) for c in _targets(design).concepts):
        return None
    return "no target has a readout and two labels"


def _not_additive(design: Design) -> str | None:
    refusals = [model.additivity_refusal for model in design.pair.models if model.additivity_refusal]
    if refusals:
        return f"what blocks write does not add up in this architecture ({refusals[0]})"
    if all(c.stimuli.kind == "categorical" for c in _targets(design).concepts):
        return "every target has categories, which have no single direction"
    return None


def _own(design: Design) -> str | None:
    if "own" in design.templates:
        return "the template 'own' gives each model its own tokens, and these need the same ones in both"
    return None


QUESTIONS = (
    Question("attenuation", "encode", measure),
    Question("coupling", "express", couple),
    Question("stitching", "use", stitch_design, _own),
    Question("gain", "use", _steer),
    Question("patching", "use", _patch, _one_sided),
    Question("attribution", "use", _attribute, _not_additive),
)
TYPES = {
    **FINDING_TYPES,
    **ATTRIBUTION_TYPES,
    **GAIN_TYPES,
    **PATCHING_TYPES,
    **ESTIMATE_TYPES,
    **TRANSPLANT_TYPES,
    **{cls.__name__: cls for cls in (Coupling, CoupledConcept, Stitching, StitchedConcept)},
}
"""Every dataclass that a saved study may hold, by name."""
RESULTS = (Finding, Coupling, Stitching, Gain, Patching, Attribution, Transplants, EstimatedPatching)
"""The kinds of results that a study takes: those of its questions, and those that only a notebook asks."""


def load_result(path: str | Path) -> Any:
    """Load what the `save` of any result wrote; it says itself which kind it is.

    Raises:
        StoreError: the file is missing, is no result, or was written by a newer version.
    """
    return load_record(path, {**TYPES, **TREND_TYPES, "Ablation": Ablation})


def check_stages(stages: Sequence[str]) -> tuple[str, ...]:
    """The stages in order, `encode` always among them.

    Raises:
        InputError: an unknown stage.
    """
    for stage in stages:
        if stage not in STAGES:
            raise InputError(
                f"unknown stage '{stage}': expected one of {', '.join(STAGES)}; name some of these"
            )
    return tuple(stage for stage in STAGES if stage == "encode" or stage in stages)


def plan_questions(design: Design, stages: Sequence[str]) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    """The questions that will be asked, and why others will not be.

    Raises:
        InputError: a stage is asked of a model that cannot answer it, or a readout cannot be asked.
    """
    wanted, notes = check_stages(stages), []
    later = [stage for stage in wanted if stage != "encode"]
    asked = [c for c in design.concepts if has_readout(c.stimuli) and c.stimuli.kind != "categorical"]
    if later and not any(c.role == "target" for c in asked):
        notes.append(
            f"The stages {' and '.join(later)} were skipped: no target says what is asked after its texts (no readout)."
        )
        wanted = ("encode",)
    elif later:
        silent = [c.name for c in design.concepts if c not in asked]
        if silent:
            notes.append(f"Without a readout, and so in no stage but encode: {', '.join(silent)}.")
        if "use" in later:
            check_replay(design.pair)
        for concept in asked:
            for template in design.templates:
                for side in (0, 1):
                    ask_design(design, concept, template, side)
    questions = []
    for question in QUESTIONS:
        if question.stage not in wanted:
            continue
        hindrance = question.hindrance(design)
        if hindrance:
            notes.append(f"Not asked: {question.key}, because {hindrance}.")
        else:
            questions.append(question)
    return tuple(questions), tuple(notes)


def answer_questions(
    questions: Sequence[Question], design: Design, settings: Settings, store: Store
) -> tuple[Any, ...]:
    """Ask all of them, in order; an answer that is in the store is not worked out again."""
    described = [
        describe_design(design),
        [model.fingerprint for model in design.pair.models],
        asdict(settings),
    ]
    answers = []
    for question in questions:
        answer = partial(question.answer, design, settings, store)
        # What encode reads is kept activation by activation, and its numbers follow in seconds.
        if question.stage != "encode":
            key = digest_of([question.key, __version__, described])
            answer = partial(store.remember_record, key, answer, TYPES)
        answers.append(answer())
    return tuple(answers)


def finding_of(results: Sequence[Any]) -> Finding:
    """The attenuation among results, with which everything else is compared.

    Raises:
        InputError: there is none.
    """
    for result in results:
        if isinstance(result, Finding):
            return result
    raise InputError(
        f"a study got the results [{', '.join(r.key for r in results)}], expected attenuation among them; measure it first"
    )
