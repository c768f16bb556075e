"""Who writes a concept?  What embedding, every head and every MLP add along its direction, base beside aligned.

The residual stream is a sum: h = embedding + sum over blocks of (heads + attention's bias + MLP). Read along a unit direction w
and in units of the stream's rms, so is the score of a scenario's contrast, s = <D_s, w> / rms: each term is what one component
writes there, and they sum to the score exactly. w is the mean contrast of the other folds' scenarios, so that it owes nothing to
the scenarios it reads; LayerNorm models are centred over d_model, and w with them. Nothing is patched: a term is the direct path
from a component to the read position. Beside the terms of whole attentions and MLPs stands the total effect: the score that is
lost when the component's contrast is taken out at the read position and everything after it is computed again.

Intervals are t intervals over scenarios of each one's influence on a mean: its own term, and what it does to the directions of
the other folds. A component that writes much across the direction has a term that hangs on where exactly that points: with the
directions taken as known, nominal 95 % held .46 to .90 (docs/simulations); with the influence, .94 to .99.

How *much* is lost between two models is said by strength, not by this score: a direction that is estimated is noisier where the
signal is weaker. This says who writes what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import pack, rearrange
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from empathy_probes.activations import Activations
from empathy_probes.batches import Pool, pad_tokens
from empathy_probes.coding import scenario_contrasts
from empathy_probes.concepts import Concept
from empathy_probes.design import Design, Settings, describe_design, design_study, neutral_name
from empathy_probes.errors import InputError
from empathy_probes.extraction import extract, plan_extraction
from empathy_probes.interventions import add_values
from empathy_probes.kernels import u_statistic
from empathy_probes.lens import LogitLens, logit_lens
from empathy_probes.models import Model
from empathy_probes.pairs import ModelPair
from empathy_probes.probes import N_FOLDS
from empathy_probes.prompts import RenderedPrompt
from empathy_probes.sites import HEADS, Site
from empathy_probes.stats import grouped_folds
from empathy_probes.stimuli import StimulusSet
from empathy_probes.store import Store, open_store
from empathy_probes.writes import AttributedConcept, Attribution, module_parts

DIRECTIONS = ("own", "base")
# Of final states that the lens takes its derivative at.
LENS_STATES = 100
# Of states between blocks that are held while components are ablated.
STATE_BYTES = 1 << 28


# ---------------------------------------------------------------- the two entrances


def attribute(
    pair: ModelPair,
    concepts: Concept | Sequence[Concept],
    controls: Concept | Sequence[Concept] = (),
    *,
    template: str = "both",
    layer: int | None = None,
    direction: str = "own",
    total_effects: bool = True,
    draws: int = 1000,
    seed: int = 0,
    neutral: Sequence[str] | None = None,
    store: str | None = None,
) -> Attribution:
    """What every component of both models writes along each concept's direction at the read position.

    Args:
        pair: base and aligned model.
        concepts: targets.
        controls: contrasts that have nothing to do with affect or stance.
        template: raw, shared, own or both.
        layer: 0-based block after which the score is read; the last by default.
        direction: own (each model's), or base (the base's in both: only where they share a basis).
        total_effects: of targets, also ablate every attention and MLP and compute what follows.
        draws: multiplier draws behind the band.
        seed: of folds and draws.
        neutral: texts of no concept, for the logit lens and its null; the shipped ones by default.
        store: activation store; the default one if None.

    Raises:
        InputError: writes do not add up in this architecture, or no concept has one direction.
    """
    design = design_study(pair, concepts, controls, template=template, neutral=neutral)
    return attribute_design(
        design, Settings(draws=draws, seed=seed), open_store(store), layer=layer, direction=direction,
        total_effects=total_effects,
    )  # fmt: skip


def attribute_design(
    design: Design,
    settings: Settings,
    store: Store,
    *,
    layer: int | None = None,
    direction: str = "own",
    total_effects: bool = True,
) -> Attribution:
    """Attribute a design's concepts; arguments as in `attribute`."""
    pair = design.pair
    target = pair.base.n_layers - 1 if layer is None else layer
    _check(pair, target, direction)
    found = tuple(c for c in design.concepts if c.stimuli.kind != "categorical")
    if not found:
        raise InputError(
            f"all of {', '.join(c.name for c in design.concepts)} have categories, expected two labels or grades, which have one "
            "direction; ask for one of their contrasts instead"
        )
    attributed = tuple(
        _attribute_concept(
            design, concept, template, target, direction, settings, store,
            total_effects and concept.role == "target",
        )
        for template in design.templates
        for concept in found
    )  # fmt: skip
    return Attribution(
        attributed, target, pair.base.n_layers, pair.base.n_heads, _biased(pair), direction, settings,
        tuple(c.name for c in design.concepts if c not in found), describe_design(design),
    )  # fmt: skip


def _check(pair: ModelPair, layer: int, direction: str) -> None:
    if direction not in DIRECTIONS:
        raise InputError(
            f"unknown direction '{direction}': expected one of {', '.join(DIRECTIONS)}; choose one"
        )
    if not isinstance(layer, int | np.integer) or not 0 <= layer < pair.base.n_layers:
        raise InputError(
            f"layer got {layer}, expected a block index from 0 to {pair.base.n_layers - 1} of '{pair.base.name}'; choose among those"
        )
    for model in pair.models:
        if model.additivity_refusal:
            raise InputError(
                f"'{model.name}' ({model.architecture}) cannot be attributed to its components: {model.additivity_refusal}, "
                "expected writes that sum to the residual stream; ask where expression is lost by stitching instead"
            )
    if pair.base.n_heads != pair.aligned.n_heads:
        raise InputError(
            f"base '{pair.base.name}' has {pair.base.n_heads} heads and aligned '{pair.aligned.name}' {pair.aligned.n_heads}, "
            "expected the same; choose a base model and a model tuned from it"
        )


def _biased(pair: ModelPair) -> bool:
    return any(model.attention_output(0)[1] is not None for model in pair.models)


@dataclass(frozen=True)
class _Side:
    """One model's activations for a concept, and where its contrast points."""

    model: Model
    prompts: tuple[RenderedPrompt, ...]
    stream: Activations
    mlp: Activations
    heads: Activations
    at: Activations
    """The stream after the block read."""
    differences: Float[np.ndarray, "unit d_model"]
    """D_s there: centred where the model centres, in units of its rms."""

    @property
    def rms(self) -> float:
        return float(self.at.rms[0])


def _attribute_concept(
    design: Design, concept: Concept, template: str, layer: int, direction: str, settings: Settings, store: Store,
    effects: bool,
) -> AttributedConcept:  # fmt: skip
    stimuli = concept.stimuli
    sides = [_read_side(design, concept, template, side, layer, store) for side in (0, 1)]
    by_unit = dict(zip(stimuli.units, grouped_folds(stimuli.units, N_FOLDS, settings.seed), strict=True))
    unit_folds = np.array([by_unit[unit] for unit in stimuli.units])
    folds = np.array([by_unit[item.unit] for item in stimuli.items])
    owners = sides if direction == "own" else [sides[0], sides[0]]
    directions = [_directions(owner, unit_folds, concept.name, layer) for owner in owners]
    writes, moves, scores, contrasts, strengths, lenses, lost = [], [], [], [], [], [], []
    for side, (ours, owner, w) in enumerate(zip(sides, owners, directions, strict=True)):
        writes.append(
            _contrast(_leaf_writes(ours, w, folds, layer, _biased(design.pair)), stimuli) / ours.rms
        )
        fold_means = _fold_means(ours, stimuli, unit_folds, layer, _biased(design.pair))
        moves.append(direction_influence(owner.differences, unit_folds, fold_means) / ours.rms)
        scores.append((ours.differences * w[unit_folds]).sum(-1))
        kernel = ours.differences @ ours.differences.T
        strengths.append(np.sqrt(max(float(u_statistic(kernel).value), 0.0)))
        mean = owner.differences.mean(0)
        length = float(ours.differences.mean(0) @ mean / np.linalg.norm(mean))
        contrasts.append(mean / np.linalg.norm(mean) * length * ours.rms)
        lenses.append(_lens(design, concept, template, side, layer, contrasts[-1], settings, store))
        if effects and ours.model.replay_refusal is None:
            label = f"attribution · {('base', 'aligned')[side]} · {template} · {concept.name}"
            lost.append(_total_effects(ours, w, folds, layer, stimuli, label))
    return AttributedConcept(
        concept.name, concept.role, template, stimuli.units, np.stack(writes), np.stack(moves), np.stack(scores), np.array(strengths),
        np.stack(contrasts), np.stack(lost) if len(lost) == 2 else None, tuple(lenses),
    )  # fmt: skip


def _layers(design: Design, needed: Sequence[int]) -> tuple[int, ...]:
    """What is read: the design's own layers where they will do, so that what attenuation left in the store serves."""
    return design.layers if set(needed) <= set(design.layers) else tuple(needed)


def _read_side(design: Design, concept: Concept, template: str, side: int, layer: int, store: Store) -> _Side:
    model, prompts = design.pair.models[side], design.prompts[concept.name, template][side]
    label = f"attribution · {('base', 'aligned')[side]} · {template} · {concept.name}"
    blocks = tuple(range(layer + 1))
    layers = _layers(design, (-1, *blocks))
    acts = extract(model, prompts, ("resid_post", "mlp_out", HEADS), layers, store, label=label)
    stream, mlp, heads = (acts[name] for name in ("resid_post", "mlp_out", HEADS))
    at = _only(stream, (layer,))
    differences = scenario_contrasts(at.normalised, concept.stimuli)[0, :, 0]
    return _Side(model, prompts, stream, _only(mlp, blocks), _only(heads, blocks), at, differences)


def _only(acts: Activations, layers: tuple[int, ...]) -> Activations:
    rows = [acts.layers.index(layer) for layer in layers]
    return replace(acts, acts=acts.acts[:, rows], layers=layers)


def fold_directions(
    differences: Float[np.ndarray, "unit d_model"], unit_folds: Int[np.ndarray, " unit"]
) -> Float[np.ndarray, "fold d_model"]:
    """Per fold the unit direction of the other folds' mean contrast; 0 where that is 0."""
    means = np.stack([differences[unit_folds != fold].mean(0) for fold in range(N_FOLDS)])
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    return np.divide(means, lengths, out=np.zeros_like(means), where=lengths > 0)


def direction_influence(
    differences: Float[np.ndarray, "unit d_model"],
    unit_folds: Int[np.ndarray, " unit"],
    fold_means: Float[np.ndarray, "fold leaf d_model"],
) -> Float[np.ndarray, "leaf unit"]:
    """What each scenario adds to the mean write of every component through the directions it helped to estimate.

    A term is mean_f n_f/n <B_f, w_f>, B_f the component's mean contrast in fold f and w_f = m_f/|m_f| the other folds' direction.
    Scenario s moves w_f by (I - w_f w_f')(D_s - m_f) / (n_train |m_f|): a component that writes across the direction has a term that
    hangs on where the direction points, and an interval without this would not know.
    """
    w = fold_directions(differences, unit_folds)
    added = np.zeros((fold_means.shape[1], len(differences)))
    for fold, (unit, means) in enumerate(zip(w, fold_means, strict=True)):
        train = unit_folds != fold
        centre = differences[train].mean(0)
        moves = differences[train] - centre
        moves = (moves - np.outer(moves @ unit, unit)) / (train.sum() * np.linalg.norm(centre))
        added[:, train] += (~train).sum() * means @ moves.T
    return added


def _directions(
    side: _Side, unit_folds: Int[np.ndarray, " unit"], concept: str, layer: int
) -> Float[np.ndarray, "fold d_model"]:
    w = fold_directions(side.differences, unit_folds)
    if not w.any(axis=1).all():
        raise InputError(
            f"concept '{concept}' has no contrast after block {layer} of '{side.model.name}': its texts give equal states there, "
            "expected states that differ; choose another layer or read position"
        )
    return w


def _leaf_writes(
    side: _Side,
    w: Float[np.ndarray, "fold d_model"],
    folds: Int[np.ndarray, " item"],
    layer: int,
    biased: bool,
) -> Float[np.ndarray, "item leaf"]:
    """What every component writes along each text's direction, in raw units; the bias, the same for all texts, as 0."""
    n_heads = side.model.n_heads
    embedding = _project(_only(side.stream, (-1,)).acts, w[:, None], folds)
    mlp = _project(side.mlp.acts, np.repeat(w[:, None], layer + 1, 1), folds)
    # W_O w is taken once per block and fold, so that no head's write is ever made in full.
    seen = np.stack([_weight(side.model, block) @ w.T for block in range(layer + 1)])
    heads = _project(
        rearrange(side.heads.acts, "item block (head k) -> item (block head) k", head=n_heads),
        rearrange(seen, "block (head k) fold -> fold (block head) k", head=n_heads),
        folds,
    )
    heads = rearrange(heads, "item (block head) -> item block head", head=n_heads)
    bias = np.zeros((len(folds), layer + 1, int(biased)))
    blocks, _ = pack([heads, bias, mlp], "item block *")
    return np.concatenate([embedding, rearrange(blocks, "item block leaf -> item (block leaf)")], axis=1)


def _fold_means(
    side: _Side, stimuli: StimulusSet, unit_folds: Int[np.ndarray, " unit"], layer: int, biased: bool
) -> Float[np.ndarray, "fold leaf d_model"]:
    """Mean contrast of every component in every fold, as vectors in raw units: only as many as there are folds are ever made."""
    n_heads, d = side.model.n_heads, side.model.d_model

    def means(acts: Activations) -> np.ndarray:
        each = scenario_contrasts(acts.acts.astype(np.float64), stimuli)[0]
        return np.stack([each[unit_folds == fold].mean(0) for fold in range(N_FOLDS)])

    embedding, mlp = means(_only(side.stream, (-1,))), means(side.mlp)
    heads = rearrange(means(side.heads), "fold block (head k) -> fold block head k", head=n_heads)
    blocks = []
    for block in range(layer + 1):
        weight = rearrange(_weight(side.model, block), "(head k) d -> head k d", head=n_heads)
        made = np.einsum("fhk,hkd->fhd", heads[:, block], weight, optimize=True)
        blocks += [made, *([np.zeros((N_FOLDS, 1, d))] if biased else []), mlp[:, block, None]]
    return np.concatenate([embedding, *blocks], axis=1)


def _weight(model: Model, block: int) -> Float[np.ndarray, "d_attn d_model"]:
    return model.attention_output(block)[0].float().cpu().numpy().astype(np.float64)


def _project(
    rows: Float[np.ndarray, "item place width"],
    weights: Float[np.ndarray, "fold place width"],
    folds: Int[np.ndarray, " item"],
) -> Float[np.ndarray, "item place"]:
    """Every place's row along the direction of its text's fold, in float64."""
    out = np.empty(rows.shape[:2])
    for fold, weight in enumerate(weights):
        mine = folds == fold
        out[mine] = np.einsum("ipd,pd->ip", rows[mine].astype(np.float64), weight)
    return out


def _contrast(values: Float[np.ndarray, "item leaf"], stimuli: StimulusSet) -> Float[np.ndarray, "leaf unit"]:
    """The within-scenario contrast of every column."""
    return np.ascontiguousarray(scenario_contrasts(values[:, :, None], stimuli)[0, :, :, 0].T)


def _lens(
    design: Design, concept: Concept, template: str, side: int, layer: int, contrast: Float[np.ndarray, " d_model"],
    settings: Settings, store: Store,
) -> LogitLens:  # fmt: skip
    model, last = design.pair.models[side], design.pair.base.n_layers - 1
    name = neutral_name(concept)
    layers = _layers(design, tuple(sorted({layer, last})))
    label = f"attribution · {('base', 'aligned')[side]} · {template} · {name}"
    acts = extract(model, design.prompts[name, template][side], ("resid_post",), layers, store, label=label)[
        "resid_post"
    ]
    here = _only(acts, (layer,))
    finals = _only(acts, (last,)).acts[:LENS_STATES, 0].astype(np.float64)
    neutral = here.normalised[:, 0] * here.rms[0]  # centred where the model centres
    return logit_lens(model, contrast, finals, neutral, seed=settings.seed)


# ---------------------------------------------------------------- total effects


def _total_effects(
    side: _Side, w: Float[np.ndarray, "fold d_model"], folds: Int[np.ndarray, " item"], layer: int,
    stimuli: StimulusSet, label: str,
) -> Float[np.ndarray, "module unit"]:  # fmt: skip
    """Score lost per scenario when a module writes the same for all of a scenario's texts, all after it computed again.

    At every read position the module's output is moved by what brings its mean over them to the scenario's mean: its contrast is
    gone, and with it exactly its term of the score; what later blocks make of that is the rest of the total effect.
    """
    model, modules, site = side.model, module_parts(layer), Site(layer)
    away = {name: _to_the_mean(acts, stimuli) for name, acts in
            (("embedding", _only(side.stream, (-1,))), ("attn", side.heads), ("mlp", side.mlp))}  # fmt: skip
    longest = max(len(prompt.ids) for prompt in side.prompts)
    budget = max(longest, min(4096, STATE_BYTES // (4 * (layer + 2) * model.d_model)))
    scores = np.zeros((len(side.prompts), 1 + len(modules)))
    with tqdm(total=len(side.prompts), unit="text", desc=label, leave=False, disable=None) as bar:
        for index in map(list, plan_extraction(side.prompts, 1, model.d_model, budget).batches):
            batch = pad_tokens([side.prompts[i].ids for i in index], model.device)
            pool = Pool.of([side.prompts[i].read for i in index], batch)
            with torch.inference_mode():
                states = [Site(block) for block in range(-1, layer + 1)]
                whole = model.run(batch, read=states, last_layer=model.n_layers - 1, capture=True)
                ends = [pool(whole.acts[site])]
                for part in modules:
                    shift = torch.as_tensor(
                        away[part.component][index, max(part.layer, 0)], device=model.device
                    )
                    if part.component == "attn":
                        shift = shift @ model.attention_output(part.layer)[0].float()
                    moved = torch.zeros_like(whole.acts[site], dtype=torch.float32)
                    moved[pool.rows, pool.positions] = shift[pool.rows]
                    start, write = whole.acts[Site(part.layer)], {}
                    if part.component == "embedding":
                        start = add_values(moved)(start)
                    else:
                        start = whole.acts[Site(part.layer - 1)]
                        write = {Site(part.layer, f"{part.component}_out"): add_values(moved)}
                    after = -1 if part.component == "embedding" else part.layer - 1
                    run = model.replay(whole, start, after, [site], write, last_layer=layer, pool=pool)
                    ends.append(run.acts[site])
            read = torch.stack(ends, 1).cpu().numpy().astype(np.float64)
            scores[index] = np.einsum("ikd,id->ik", read, w[folds[index]])
            bar.update(len(index))
    return _contrast(scores[:, :1] - scores[:, 1:], stimuli) / side.rms


def _to_the_mean(acts: Activations, stimuli: StimulusSet) -> Float[np.ndarray, "item layer width"]:
    """What brings every text's row to the mean of its scenario's."""
    scenarios = list(dict.fromkeys(item.scenario for item in stimuli.items))
    place = np.array([scenarios.index(item.scenario) for item in stimuli.items])
    sums = np.zeros((len(scenarios), *acts.acts.shape[1:]), acts.acts.dtype)
    np.add.at(sums, place, acts.acts)
    return (sums / np.bincount(place)[:, None, None].astype(sums.dtype))[place] - acts.acts
