"""Make a twin of any known checkpoint in which one thing is different, and measure what was really planted.

The base runs the concept's texts once; where the concept lies after block k, what arrives at the block's MLP, and
which directions belong to the concepts that must stay are read off these states; `surgery` does the rest. The truth of
the twin is then measured, not taken from what was intended: of shipped twins on fresh scenarios, of anybody's on the texts there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors.torch import load_file

from empathy_probes.activations import Activations
from empathy_probes.batches import pad_tokens
from empathy_probes.checkpoints import build_checkpoint, open_checkpoint
from empathy_probes.concepts import Concept
from empathy_probes.errors import InputError
from empathy_probes.extraction import extract, plan_extraction
from empathy_probes.grammar import CONTROLS, TARGETS, stimuli_rows
from empathy_probes.models import Model, load_model
from empathy_probes.pairs import ModelPair
from empathy_probes.prompts import RenderedPrompt, render
from empathy_probes.sites import Site
from empathy_probes.stimuli import stimuli_from_rows
from empathy_probes.store import Store, open_store
from empathy_probes.surgery import (
    Arrivals,
    Subspace,
    concept_subspace,
    erased,
    generic_gain,
    planted,
    rescaled,
    rotated,
    scaled_writes,
    unread,
    unsaid,
    widened,
)
from empathy_probes.weights import Checkpoint

# Tokens that a block's new neurons are fitted on.
FITTED_TOKENS = 20_000
# How much more the read position counts in that fit than another word.
READ_WEIGHT = 10.0
# Times that the strength of a concept handed on unread is measured and corrected.
SIZED = 2
# Directions of a concept scaled besides the one at the read position, where both texts of a pair have equal length.
SPAN = 3


@dataclass(frozen=True)
class Readings:
    """States of one model at one block on a concept's texts, all positions but a leading BOS."""

    after: Float[np.ndarray, "token d_model"]
    """`resid_post` of the block."""
    arrivals: Arrivals
    """What its MLP reads."""
    difference: Float[np.ndarray, " d_model"]
    """Mean of label 1 minus label 0 at the read position, after the block."""
    by_word: Float[np.ndarray, "word d_model"] | None
    """The same at every other word, times the root of how often it occurs; None unless texts pair word by word."""


def read_states(model: Model, concept: Concept, layer: int, parallel: bool, seed: int = 0) -> Readings:
    """Run a concept's texts and keep what the surgery at one block is fitted on.

    Args:
        model: the base.
        concept: binary, one text of each label per scenario at least.
        layer: the block.
        parallel: attention and MLP read the same state.
        seed: of the choice of tokens, where there are too many.
    """
    prompts = render(model.tokenizer, concept.stimuli, "raw", concept.speaker)
    middle = Site(layer - 1) if parallel else Site(layer, "resid_mid")
    states = _all_positions(model, prompts, (Site(layer), middle))
    labels = np.array([float(item.label) for item in concept.stimuli.items])
    pooled = np.stack([after[list(p.read)].mean(0) for p, (after, _) in zip(prompts, states, strict=True)])
    difference = pooled[labels == 1].mean(0) - pooled[labels == 0].mean(0)

    first = int(bool(prompts[0].ids) and prompts[0].ids[0] == model.tokenizer.bos_token_id)
    after = np.concatenate([a[first:] for a, _ in states])
    before = np.concatenate([b[first:] for _, b in states])
    at_read = np.concatenate([np.isin(np.arange(first, len(p.ids)), p.read).astype(float) for p in prompts])
    by_word = _by_word(concept, prompts, [a for a, _ in states], first)
    if len(after) > FITTED_TOKENS:
        chance = np.where(at_read > 0, READ_WEIGHT, 1.0)
        rng = np.random.default_rng(seed)
        chosen = rng.choice(len(after), FITTED_TOKENS, replace=False, p=chance / chance.sum())
        after, before, at_read = after[chosen], before[chosen], at_read[chosen]
    return Readings(after, Arrivals(before, 1 + (READ_WEIGHT - 1) * at_read, at_read), difference, by_word)


def _all_positions(
    model: Model, prompts: Sequence[RenderedPrompt], sites: Sequence[Site]
) -> list[tuple[np.ndarray, ...]]:
    """Per prompt, each site's `[pos d_model]` in float64."""
    import torch

    states: list[tuple[np.ndarray, ...]] = [()] * len(prompts)
    for batch in plan_extraction(prompts, len(sites), model.d_model).batches:
        with torch.inference_mode():
            run = model.run(
                pad_tokens([prompts[i].ids for i in batch], model.device), read=list(dict.fromkeys(sites)),
                last_layer=max(0, *(site.layer for site in sites)),
            )  # fmt: skip
        for row, i in enumerate(batch):
            states[i] = tuple(run.acts[s][row, : len(prompts[i].ids)].double().cpu().numpy() for s in sites)
    return states


def _by_word(
    concept: Concept, prompts: Sequence[RenderedPrompt], after: Sequence[np.ndarray], first: int
) -> np.ndarray | None:
    """Mean differences per word of label 1, sqrt(count)-weighted; None where pairs differ in length."""
    pairs: dict[str, dict[float, int]] = {}
    for i, item in enumerate(concept.stimuli.items):
        pairs.setdefault(item.scenario, {})[float(item.label)] = i
    words: dict[int, list[np.ndarray]] = {}
    for pair in pairs.values():
        one, zero = pair[1.0], pair[0.0]
        if len(prompts[one].ids) != len(prompts[zero].ids):
            return None
        for position in range(first, len(prompts[one].ids)):
            words.setdefault(prompts[one].ids[position], []).append(
                after[one][position] - after[zero][position]
            )
    return np.stack([np.mean(d, 0) * np.sqrt(len(d)) for d in words.values()])


def locate(readings: Readings, others: Sequence[Float[np.ndarray, " d_model"]]) -> Subspace:
    """Where the concept lies after the block, apart from the other concepts' mean differences."""
    guards = np.stack(others) if others else np.zeros((0, len(readings.difference)))
    rank = 1 if readings.by_word is None else 1 + SPAN
    return concept_subspace(readings.after, readings.difference, guards, readings.by_word, rank)


# ---------------------------------------------------------------- families


@dataclass(frozen=True)
class Order:
    """What a family needs to make its twin."""

    checkpoint: Checkpoint
    layer: int
    keep: float
    seed: int
    readings: Readings | None
    where: Subspace | None
    through: int
    """Last block whose writes are scaled, where a family scales those of several."""
    size: float = 1.0
    """How much stronger than it was a concept is handed on unread."""


def _identical(o: Order) -> tuple[Checkpoint, Checkpoint]:
    return o.checkpoint, o.checkpoint


def _with_concept(
    make: Callable[..., tuple[Checkpoint, Checkpoint]],
) -> Callable[[Order], tuple[Checkpoint, Checkpoint]]:
    def build(o: Order) -> tuple[Checkpoint, Checkpoint]:
        assert o.where is not None and o.readings is not None  # families in NEED_CONCEPT
        return make(o, o.where, o.readings.arrivals)

    return build


FAMILIES: dict[str, Callable[[Order], tuple[Checkpoint, Checkpoint]]] = {
    "identical": _identical,
    "template_shift": _identical,
    "rotated": lambda o: (o.checkpoint, rotated(o.checkpoint, o.seed)),
    "rescaled": lambda o: (o.checkpoint, rescaled(o.checkpoint)),
    "generic_gain": _with_concept(lambda o, w, a: generic_gain(o.checkpoint, o.layer, o.keep, a, o.seed)),
    "planted": _with_concept(lambda o, w, a: planted(o.checkpoint, o.layer, o.keep, w, a)),
    "local": _with_concept(lambda o, w, a: planted(o.checkpoint, o.layer, o.keep, w, a, only_read=True)),
    "erased": _with_concept(lambda o, w, a: erased(o.checkpoint, o.layer, w, a, o.keep)),
    "unread": _with_concept(lambda o, w, a: unread(o.checkpoint, o.layer, w, a, o.keep, o.size)),
    "unsaid": _with_concept(lambda o, w, a: unsaid(o.checkpoint, w)),
    "scaled_writes": _with_concept(
        lambda o, w, a: (o.checkpoint, scaled_writes(o.checkpoint, range(o.layer, o.through + 1), o.keep, w))
    ),
}
"""Family to a function that makes base and twin of it; base computes what the checkpoint computes."""
TRAINED = ("continued", "rerouted")
EXACT_BEFORE = ("planted", "local", "erased", "generic_gain", "unread", "scaled_writes")
"""Families that leave every block before theirs bit by bit as it was."""
TUNED = ("planted", "local", "erased", "unread")
NEED_CONCEPT = ("generic_gain", "planted", "local", "erased", "unread", "unsaid", "scaled_writes")
KEEPING = ("generic_gain", "planted", "local", "scaled_writes")
READ_AT = {"local": "Reply"}
"""Families of the grammar's twins whose texts are read at a word of theirs, not at their end: there the answer is formed, so
that a concept which is weaker at the end only is said less too."""


def make_twin(
    checkpoint: Checkpoint,
    model: Model,
    family: str,
    concept: Concept | None = None,
    others: Sequence[Float[np.ndarray, " d_model"]] = (),
    layer: int | None = None,
    keep: float = 0.25,
    seed: int = 0,
    through: int | None = None,
) -> tuple[Checkpoint, Checkpoint]:
    """Make base and twin of one family.

    Args:
        checkpoint: what the twin is made of.
        model: the same, running.
        family: one of `FAMILIES`.
        concept: what is planted; needed by most families.
        others: mean differences after the block of the concepts to leave alone.
        layer: the block; the last one for `unsaid`, else the middle one by default.
        keep: what is left of the concept, 0 to 1.
        seed: of random choices.
        through: `scaled_writes` scales what the blocks from `layer` to this one write; to the last one by default.

    Raises:
        InputError: the family is unknown or trained, or something it needs is missing or out of range.
    """
    layer = check_order(checkpoint, family, concept, layer, keep, through)
    keep = 0.0 if family in ("erased", "unread") else keep
    readings = where = None
    if family in NEED_CONCEPT and concept is not None:
        readings = read_states(model, concept, layer, checkpoint.layout.parallel, seed)
        where = locate(readings, others)
    last = checkpoint.n_layers - 1 if through is None else through
    order = Order(checkpoint, layer, keep, seed, readings, where, last)
    made = FAMILIES[family](order)
    if family not in TUNED or where is None or readings is None or concept is None or keep == 1:
        return made
    # What the neurons subtract is proportional to 1 - keep but, over a varying norm, not quite all that was asked for.
    twin = _running(made[1], model)
    left = where.read[0] @ read_states(twin, concept, layer, checkpoint.layout.parallel, seed).difference
    taken = 1 - left / (where.read[0] @ readings.difference)
    if taken < 0.2 * (1 - keep):
        raise InputError(
            f"the edit at block {layer} took {taken:.0%} of '{concept.name}', expected about {1 - keep:.0%}: it cannot be planted "
            "there; choose another block or concept"
        )
    order = replace(order, keep=1 - (1 - keep) ** 2 / taken)
    made = FAMILIES[family](order)
    if family == "unread":
        # Blocks that do not read a concept do not add to it either: it is handed on the stronger, as strong as it is on average.
        asked = contrast_strengths(model, concept)[layer:]
        for _ in range(SIZED):
            lost = contrast_strengths(_running(made[1], model), concept)[layer:] / asked
            order = replace(order, size=order.size / float(np.exp(np.log(lost).mean())))
            made = FAMILIES[family](order)
    return made


def _running(checkpoint: Checkpoint, model: Model) -> Model:
    made = build_checkpoint(checkpoint.config, checkpoint.tensors)
    return load_model((made, model.tokenizer), device="cpu", copy=False)


def check_order(
    checkpoint: Checkpoint,
    family: str,
    concept: Concept | None,
    layer: int | None,
    keep: float,
    through: int | None = None,
) -> int:
    """Refuse what cannot be made; return the block it will be made at."""
    if family not in FAMILIES:
        remedy = "build it with scripts/build_phantoms.py" if family in TRAINED else "choose one of these"
        raise InputError(
            f"family '{family}' cannot be made from a checkpoint, expected one of {', '.join(FAMILIES)}; {remedy}"
        )
    if family in NEED_CONCEPT and concept is None:
        raise InputError(
            f"family '{family}' got no concept, expected one; name a shipped concept or give stimuli"
        )
    if family in NEED_CONCEPT and concept is not None and concept.stimuli.kind != "binary":
        raise InputError(
            f"family '{family}' got the concept '{concept.name}', whose labels are {concept.stimuli.kind}, expected two labels, 0 and 1; "
            "choose a concept of two"
        )
    layer = default_layer(family, checkpoint.n_layers) if layer is None else layer
    if not 0 <= layer < checkpoint.n_layers:
        raise InputError(
            f"layer {layer} does not exist, expected 0 to {checkpoint.n_layers - 1}; choose a block of this model"
        )
    if not 0 <= keep <= 1 or (family == "generic_gain" and keep == 0):
        least = "above 0" if family == "generic_gain" else "from 0 (all removed)"
        raise InputError(f"keep is {keep}, expected a number {least} to 1 (nothing changed); choose one such")
    if through is not None and (family != "scaled_writes" or not layer <= through < checkpoint.n_layers):
        raise InputError(
            f"through is {through} with family '{family}' at layer {layer}, expected scaled_writes and a block from {layer} to "
            f"{checkpoint.n_layers - 1}; leave it out for the last one"
        )
    return layer


def default_layer(family: str, n_layers: int) -> int:
    """The block that a family works at unless one is named."""
    return n_layers - 1 if family == "unsaid" else n_layers // 2


# ---------------------------------------------------------------- twins of the shipped bases


def list_bases(phantoms: str | Path | None = None) -> dict[str, Path]:
    """Names and folders of the phantom bases: the shipped ones, and those in a folder of built ones, which come first.

    Raises:
        InputError: the folder is not there or holds no base.
    """
    shipped = Path(str(files("empathy_probes"))) / "data" / "phantoms"
    bases = {f"{path.parent.name}-0": path.parent for path in sorted(shipped.glob("*/base"))}
    if phantoms is not None:
        built = {
            path.parent.name: path.parent
            for path in sorted(Path(phantoms).glob("*-*/base"))
            if path.parent.name.rsplit("-", 1)[1].isdigit()
        }
        if not built:
            raise InputError(
                f"no phantom bases in '{phantoms}', expected folders such as llama-1/base; build them with scripts/build_phantoms.py"
            )
        bases |= built
    return bases


def has_twin(folder: Path, family: str) -> bool:
    """Whether a family can be had for a base: the trained ones only where their tensors lie beside it."""
    return family not in TRAINED or (folder / f"{family}.safetensors").is_file()


def twin_checkpoints(
    folder: Path, family: str, concept: str | None = None, layer: int | None = None, keep: float | None = None
) -> tuple[Checkpoint, Checkpoint, Any]:
    """A phantom base and its twin of one family as checkpoints, and their tokenizer.

    Args:
        folder: of the base, as `list_bases` gives it.
        family: of `FAMILIES` or `TRAINED`.
        concept: of the grammar; what is planted.
        layer: the block, where the family has one.
        keep: what is left of the concept.
    """
    config, tensors, tokenizer = open_checkpoint(folder / "base")
    checkpoint = Checkpoint(config, tensors)
    if family in TRAINED:
        # A trained twin is stored as what was added to the base.
        added = load_file(folder / f"{family}.safetensors")
        wider = max((d.numel() - tensors[key].numel()) // checkpoint.d_model for key, d in added.items())
        start = widened(checkpoint, wider) if wider else checkpoint
        twin = start.change({key: start.tensors[key] + delta.float() for key, delta in added.items()})
        return start, twin, tokenizer
    model = load_model(folder / "base", device="cpu", name=folder.name)
    name, read = concept or TARGETS[0], READ_AT.get(family, "")
    asked = grammar_concept(name, read)
    place = layer if layer is not None else default_layer(family, checkpoint.n_layers)
    others = guards(folder, name, place, read)
    made = make_twin(checkpoint, model, family, asked, others, layer, 0.25 if keep is None else keep)
    return *made, tokenizer


def open_twin(
    folder: Path, family: str, concept: str | None, layer: int | None, keep: float | None
) -> ModelPair:
    """The same as a pair of models; the family "dtype" is the base itself beside it in bfloat16."""
    base, twin, tokenizer = twin_checkpoints(
        folder, "identical" if family == "dtype" else family, concept, layer, keep
    )
    dtypes = (None, "bfloat16" if family == "dtype" else None)
    models = [
        load_model((build_checkpoint(c.config, c.tensors), tokenizer), device="cpu", copy=False, dtype=dtype,
                   name=f"{folder.name} {side}")
        for c, dtype, side in zip((base, twin), dtypes, ("base", family), strict=True)
    ]  # fmt: skip
    # Not make_pair: a pair in two dtypes is what it refuses, and what one family is about.
    return ModelPair(*models)


def grammar_concept(name: str, read: str = "") -> Concept:
    """Texts of a concept of the grammar that twins are made with."""
    stimuli = stimuli_from_rows(stimuli_rows(name, FITTED_SCENARIOS, FITTED_SEED, read=read), name)
    return Concept(name, "target", "", "", "user", "", stimuli)


FITTED_SCENARIOS, FITTED_SEED = 400, 21


def guards(folder: Path, concept: str, layer: int, read: str = "") -> list[Float[np.ndarray, " d_model"]]:
    """Mean differences after a block of a base of all concepts of the grammar but one."""
    return [d[layer] for other, d in _guards(folder, read).items() if other != concept]


@cache
def _guards(folder: Path, read: str) -> dict[str, Float[np.ndarray, "layer d_model"]]:
    """Mean difference of every concept of the grammar after every block of a base, from beside it where it was kept."""
    kept = guards_file(folder, read)
    if kept.is_file():
        return {name: tensor.double().numpy() for name, tensor in load_file(kept).items()}
    return measure_guards(folder, read)


def guards_file(folder: Path, read: str) -> Path:
    """Where they are kept, per word at which texts are read."""
    return folder / f"guards{f'-{read}' if read else ''}.safetensors"


def measure_guards(folder: Path, read: str = "") -> dict[str, Float[np.ndarray, "layer d_model"]]:
    """The same, measured."""
    model = load_model(folder / "base", device="cpu", name=folder.name)
    store = open_store(f"memory://guards/{folder.name}")
    guards = {}
    for name in (*TARGETS, *CONTROLS):
        guards[name] = mean_differences(model, grammar_concept(name, read), store)
    store.clear()
    return guards


def mean_differences(model: Model, concept: Concept, store: Store) -> Float[np.ndarray, "layer d_model"]:
    """Mean of label 1 minus label 0 at the read position after every block, raw units."""
    return _mean_difference(_after_blocks(model, concept, store).acts, concept)


def contrast_strengths(model: Model, concept: Concept) -> Float[np.ndarray, " layer"]:
    """Length of the same in units of the rms."""
    store = open_store("memory://strengths")
    found = _mean_difference(_after_blocks(model, concept, store).normalised, concept)
    store.clear()
    return np.asarray(np.linalg.norm(found, axis=-1))


def _after_blocks(model: Model, concept: Concept, store: Store) -> Activations:
    prompts = render(model.tokenizer, concept.stimuli, "raw", concept.speaker)
    return extract(model, prompts, ("resid_post",), range(model.n_layers), store)["resid_post"]


def _mean_difference(
    acts: Float[np.ndarray, "item layer d_model"], concept: Concept
) -> Float[np.ndarray, "layer d_model"]:
    labels = np.array([float(item.label) for item in concept.stimuli.items])
    return acts[labels == 1].mean(0).astype(float) - acts[labels == 0].mean(0).astype(float)
