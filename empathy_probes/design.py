"""What a study will measure, resolved and validated before anything runs.

A design renders every text of every concept for both models under every template and refuses what cannot be
measured; every question is asked of the same design. Identical prompts in both models are the rule (`raw`,
`shared`); `own` renders each model's with its own template and is confounded by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any, Literal

from empathy_probes.coding import categories
from empathy_probes.concepts import Concept, load_neutral
from empathy_probes.errors import InputError, check_seed
from empathy_probes.extraction import check_prompts
from empathy_probes.models import Model
from empathy_probes.pairs import ModelPair
from empathy_probes.prompts import RenderedPrompt, Style, has_chat_template, render
from empathy_probes.sites import COMPONENTS
from empathy_probes.stimuli import Stimulus, StimulusSet
from empathy_probes.store import digest_of

TEMPLATES = ("raw", "shared", "own", "both")
MIN_SCENARIOS = 30
FEWEST_NEUTRAL = 50


@dataclass(frozen=True)
class Settings:
    """Choices that change a number without changing what was measured."""

    margin: float = 0.10
    """δ: an attenuation within it counts as none."""
    specific_margin: float = 0.20
    """δ for the equivalence of `specific`."""
    draws: int = 1000
    """Multiplier draws behind every band."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers outside their range.

        Raises:
            InputError: margin, draws or seed.
        """
        for name in ("margin", "specific_margin"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(
                    f"{name} got {getattr(self, name)}, expected a number between 0 and 1 such as 0.1; choose one"
                )
        if self.draws < 99:
            raise InputError(
                f"draws got {self.draws}, expected at least 99, better 999: p values resolve no finer; raise it"
            )
        if self.draws > 1_000_000:
            raise InputError(
                f"draws got {self.draws}, expected at most 1000000, which resolve p to 0.000001; lower it"
            )
        check_seed(self.seed)


@dataclass(frozen=True)
class Design:
    """What will be measured, resolved and validated: nothing has run yet."""

    pair: ModelPair
    concepts: tuple[Concept, ...]
    """Targets, then controls."""
    templates: tuple[str, ...]
    components: tuple[str, ...]
    layers: tuple[int, ...]
    """−1 (the input of block 0) and the blocks asked for."""
    prompts: Mapping[tuple[str, str], tuple[tuple[RenderedPrompt, ...], tuple[RenderedPrompt, ...]]]
    """Per (concept or neutral set, template): as the base and as the aligned model see them."""
    neutral_names: tuple[str, ...]
    """The neutral sets, one per kind of read position."""
    flags: tuple[str, ...]
    neutral: tuple[str, ...]
    """Texts of no concept, for the map between models, the covariance, perplexity and the size of a dose."""


def design_study(
    pair: ModelPair,
    concepts: Concept | Sequence[Concept],
    controls: Concept | Sequence[Concept] = (),
    *,
    template: str = "both",
    sites: Sequence[str] = ("resid_post",),
    layers: Sequence[int] | None = None,
    neutral: Sequence[str] | None = None,
) -> Design:
    """Resolve templates, layers and prompts, and refuse everything that cannot be measured.

    `concepts` are targets here and `controls` controls, whatever they are by themselves.
    `neutral` are texts of no concept, for the map between models and the covariance; the shipped ones by default.

    Raises:
        InputError: a concept, template, site, layer or text cannot be used; the message says which.
    """
    targets = _in_role(concepts, "target")
    everything = (*targets, *_in_role(controls, "control"))
    for concept in everything:
        _check_concept(concept, everything)
    if not sites or not targets:
        what = "concepts" if sites else "sites"
        raise InputError(f"{what} got an empty list, expected at least one; name one or leave the option out")
    for site in sites:
        if site not in COMPONENTS:
            raise InputError(
                f"unknown site '{site}': expected one of {', '.join(COMPONENTS)}; name one of these"
            )
    blocks = tuple(range(pair.base.n_layers)) if layers is None else _whole_numbers(layers)
    outside = [layer for layer in blocks if not 0 <= layer < pair.base.n_layers]
    if outside or not blocks:
        raise InputError(
            f"layers got {outside or 'none'}, expected block indices from 0 to {pair.base.n_layers - 1} of "
            f"'{pair.base.name}'; choose among those"
        )
    templates, flags = _templates(pair, template)
    texts = load_neutral() if neutral is None else tuple(neutral)
    if len(texts) < FEWEST_NEUTRAL:
        raise InputError(
            f"{len(texts)} neutral texts were given, expected at least {FEWEST_NEUTRAL}; give more or leave them out for "
            "the shipped ones"
        )
    # Read where concepts are read: states of the last token and means over a span differ in size and spread.
    neutral_sets = {neutral_name(concept): neutral_set(texts, concept) for concept in everything}
    prompts = {
        (asked.name, chosen): _render_pair(pair, asked, chosen)
        for asked in (*everything, *neutral_sets.values())
        for chosen in templates
    }
    return Design(
        pair,
        everything,
        templates,
        tuple(dict.fromkeys(sites)),
        (-1, *blocks),
        prompts,
        tuple(neutral_sets),
        flags,
        texts,
    )


def _in_role(
    concepts: Concept | Sequence[Concept], role: Literal["target", "control"]
) -> tuple[Concept, ...]:
    found = (concepts,) if isinstance(concepts, Concept | str) else tuple(concepts)
    for concept in found:
        if not isinstance(concept, Concept):
            raise InputError(
                f"{role}s got {concept!r}, expected concepts; load each by load_concept or load_concept_file"
            )
    return tuple(replace(concept, role=role) for concept in found)


def _whole_numbers(layers: Sequence[int]) -> tuple[int, ...]:
    try:
        return tuple(sorted({index(layer) for layer in layers}))
    except TypeError:
        raise InputError(
            f"layers got {layers!r}, expected block indices, whole numbers; give those"
        ) from None


READ = {"last": "last token", "span": "mean", "message": "last token of the text"}


def neutral_name(concept: Concept) -> str:
    """Name of the neutral set that is read like this concept."""
    return f"neutral ({READ[concept.stimuli.read_kind]}, {concept.speaker})"


def neutral_set(texts: Sequence[str], concept: Concept) -> Concept:
    """Texts of no concept, read where this concept is read."""
    kind = concept.stimuli.read_kind
    items = tuple(
        Stimulus(id=f"neutral-{i}", scenario=f"neutral-{i}", messages=(), text=text, label=0.0, frame="", cluster="",
                 read={"last": None, "span": text, "message": 0}[kind], readout=None)
        for i, text in enumerate(texts)
    )  # fmt: skip
    stimuli = StimulusSet(neutral_name(concept), items, "binary", kind)
    return Concept(neutral_name(concept), "control", "", "", concept.speaker, "", stimuli)


def _check_concept(concept: Concept, everything: Sequence[Concept]) -> None:
    if sum(other.name == concept.name for other in everything) > 1:
        raise InputError(
            f"concept '{concept.name}' is given twice, expected each once as target or as control; drop one of them"
        )
    if concept.stimuli.kind == "categorical":
        _check_categories(concept)
    if concept.stimuli.n_scenarios < MIN_SCENARIOS:
        raise InputError(
            f"concept '{concept.name}' has {concept.stimuli.n_scenarios} scenarios, expected at least {MIN_SCENARIOS}: "
            "below that no interval holds; add scenarios"
        )


def _check_categories(concept: Concept) -> None:
    known = categories(concept.stimuli)
    found: dict[str, set[str]] = {}
    for item in concept.stimuli.items:
        found.setdefault(item.scenario, set()).add(str(item.label))
    for scenario, here in found.items():
        if len(here) < len(known):
            raise InputError(
                f"concept '{concept.name}', scenario '{scenario}': got no text of {', '.join(sorted(set(known) - here))}, "
                f"expected one of every category ({', '.join(known)}); add it, or put single texts that belong together "
                "into one scenario"
            )


def _templates(pair: ModelPair, template: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if template not in TEMPLATES:
        raise InputError(f"unknown template '{template}': expected one of {', '.join(TEMPLATES)}; choose one")
    if template == "raw":
        return ("raw",), ()
    if not has_chat_template(pair.aligned.tokenizer):
        if template == "both":
            return ("raw",), ("no_chat_template",)
        raise InputError(
            f"template '{template}' needs a chat template, but the tokenizer of aligned '{pair.aligned.name}' has none; "
            "use --template raw"
        )
    if template == "own" and not has_chat_template(pair.base.tokenizer):
        raise InputError(
            f"template 'own' needs a chat template on both sides, but the tokenizer of base '{pair.base.name}' has none; "
            "use --template shared"
        )
    return ("raw", "shared") if template == "both" else (template,), ()


def _render_pair(
    pair: ModelPair, concept: Concept, template: str
) -> tuple[tuple[RenderedPrompt, ...], tuple[RenderedPrompt, ...]]:
    style: Style = "raw" if template == "raw" else "chat"
    aligned = render(pair.aligned.tokenizer, concept.stimuli, style, concept.speaker)
    base = (
        aligned
        if template == "shared"
        else render(pair.base.tokenizer, concept.stimuli, style, concept.speaker)
    )
    if template == "raw":
        for ours, theirs in zip(base, aligned, strict=True):
            if ours.ids != theirs.ids:
                raise InputError(
                    f"concept '{concept.name}', item '{ours.item}': base '{pair.base.name}' and aligned "
                    f"'{pair.aligned.name}' give different token ids to the same raw text, expected identical ones; use "
                    "--template shared"
                )
    check_prompts(pair.base, base, concept.name)
    check_prompts(pair.aligned, aligned, concept.name)
    return base, aligned


def describe_design(design: Design) -> dict[str, Any]:
    """Provenance: models, tokenizers and concepts by name and digest, and what is read where; plain data."""
    return {
        "base": describe_model(design.pair.base),
        "aligned": describe_model(design.pair.aligned),
        "concepts": {
            concept.name: {
                "role": concept.role, "mechanism": concept.mechanism, "dimension": concept.dimension,
                "speaker": concept.speaker, "read": concept.stimuli.read_kind, "digest": concept.digest,
                "n_scenarios": concept.stimuli.n_scenarios, "n_texts": len(concept.stimuli.items),
                "labels": dict(concept.labels), "description": concept.description,
            }
            for concept in design.concepts
        },
        "design": {
            "template": list(design.templates), "sites": list(design.components), "layers": list(design.layers),
            "flags": list(design.flags), "neutral": digest_of(list(design.neutral)),
        },
    }  # fmt: skip


def describe_model(model: Model) -> dict[str, Any]:
    """Provenance of one model: names, digests, shape; plain data."""
    bos = model.tokenizer.bos_token_id
    return {
        "name": model.name, "revision": model.revision, "weights": model.weights,
        "fingerprint": model.fingerprint, "tokenizer": model.tokenizer_digest, "chat_template": model.template_digest,
        "architecture": model.architecture, "n_layers": model.n_layers, "d_model": model.d_model,
        "dtype": model.dtype, "device": str(model.device), "parameters": model.n_parameters,
        "bos": bool(bos is not None and model.tokenizer("a")["input_ids"][:1] == [bos]),
    }  # fmt: skip
