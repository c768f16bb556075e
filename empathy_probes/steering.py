"""How far does a push along a concept move the answer?  Dose and response, in both models.

At the read position dose · rms · w is added to the residual stream after a block, for small symmetric doses and a wider grid.
w is the unit direction from label 0 to label 1, fitted on the *other* folds' scenarios, so that no text is steered with a direction that
knows it; each model has its own w and its own rms (its own direction, in doses of its own size), or both have the base's direction.
A scenario's slope is least squares over its small doses; the gain, their mean, is in nats per dose, and its attenuation is Fieller's.

What any push does is measured beside it. The slope at dose 0 along *every* direction follows from one gradient per text, so
that thousands of covariance-matched random, shuffled-label and control-concept directions cost one backward pass; what
steering costs is the perplexity of neutral texts at each dose. One run per batch is captured, and all doses of a layer
are one replay of the blocks behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from empathy_probes import __version__
from empathy_probes.activations import Activations
from empathy_probes.batches import pad_tokens
from empathy_probes.concepts import Concept
from empathy_probes.design import Design, Settings, describe_design, design_study, neutral_name
from empathy_probes.directions import (
    N_FOLDS,
    cross_fitted_directions,
    direction_cosine,
    scenario_differences,
    unit_rows,
)
from empathy_probes.errors import InputError
from empathy_probes.extraction import extract
from empathy_probes.gains import BOUND, MODELS, SITE, Gain, SteeredConcept, cost_key
from empathy_probes.models import Model, Run
from empathy_probes.pairs import ModelPair
from empathy_probes.prompts import render_texts
from empathy_probes.readouts import (
    TOKEN_BUDGET,
    Asked,
    AskedBatch,
    ask_design,
    asked_batches,
    batch_asked,
    look_up,
    readable,
    scenario_coupling,
)
from empathy_probes.sites import Site
from empathy_probes.stats import grouped_folds
from empathy_probes.store import Store, digest_of, open_store
from empathy_probes.sweeps import check_continuable
from empathy_probes.vectors import neutral_rms

DOSES = (-1.0, -0.5, -0.25, -0.1, -0.05, 0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
SMALL = 0.1
"""Doses up to this size make the slope: a tenth of what stands there."""
MOST_LAYERS = 8
NULLS = 999
NEUTRAL_TEXTS = 50


def dose_response(
    pair: ModelPair,
    concepts: Concept | Sequence[Concept],
    controls: Concept | Sequence[Concept] = (),
    *,
    layers: Sequence[int] | None = None,
    template: str = "both",
    doses: Sequence[float] = DOSES,
    small: float = SMALL,
    directions: str = "own",
    bound: float = BOUND,
    seed: int = 0,
    neutral: Sequence[str] | None = None,
    store: str | None = None,
) -> Gain:
    """Steer both models along each concept and measure how far the answer moves.

    Args:
        pair: base and aligned model.
        concepts: targets, each with a readout.
        controls: contrasts whose directions are pushed along as well; those with a readout get a curve of their own.
        layers: 0-based blocks after which the dose is added; at most eight, spread over all, by default.
        template: raw, shared, own or both.
        doses: in units of each model's rms; 0 and the small ones in pairs must be among them.
        small: largest dose that counts for the slope.
        directions: own, each model along its own direction; base, both along the base's.
        bound: ratio of neutral perplexity that a tolerated dose may cost, at least 1.
        seed: of folds and null directions.
        neutral: texts for rms, covariance and perplexity; the shipped ones by default.
        store: activation store; the default one if None.

    Raises:
        InputError: no concept has a readout, a model cannot be continued from a state, or a dose or layer cannot be used.
    """
    chosen = spread_layers(pair.base.n_layers) if layers is None else layers
    design = design_study(pair, concepts, controls, template=template, layers=chosen, neutral=neutral)
    return dose_response_design(
        design,
        Settings(seed=seed),
        open_store(store),
        doses=doses,
        small=small,
        directions=directions,
        bound=bound,
    )


def spread_layers(n_layers: int, most: int = MOST_LAYERS) -> tuple[int, ...]:
    """At most so many blocks from the first to the last."""
    return tuple(sorted({round(x) for x in np.linspace(0, n_layers - 1, min(n_layers, most))}))


def dose_response_design(
    design: Design,
    settings: Settings,
    store: Store,
    *,
    doses: Sequence[float] = DOSES,
    small: float = SMALL,
    directions: str = "own",
    bound: float = BOUND,
) -> Gain:
    """Steer along a design's concepts after its blocks.

    Arguments as in `dose_response`.
    """
    grid = _check_doses(doses, small)
    if not 1 <= bound < np.inf:
        raise InputError(
            f"bound got {bound}, expected a ratio of perplexities of at least 1, what no dose costs; choose one such as {BOUND}"
        )
    if directions not in ("own", "base"):
        raise InputError(f"directions got '{directions}', expected own or base; choose one")
    pair = design.pair
    for model in pair.models:
        check_continuable(model)
    layers = tuple(layer for layer in design.layers if layer >= 0)
    rms = np.stack([neutral_rms(model, SITE, design.neutral)[list(layers)] for model in pair.models])
    controls = tuple(c for c in design.concepts if c.role == "control" and c.stimuli.kind != "categorical")
    found, losses = [], {}
    for template in design.templates:
        acts = _states(design, template, layers, store, (*readable(design), *controls))
        for concept in readable(design):
            others = [c for c in controls if c.name != concept.name]
            decisive = [
                "gain", __version__, [model.fingerprint for model in pair.models], [c.digest for c in (concept, *others)],
                template, [[p.ids for p in prompts] for prompts in design.prompts[concept.name, template]],
                layers, grid, directions, settings.seed, list(design.neutral),
            ]  # fmt: skip
            sides = [
                store.remember_all(
                    digest_of([*decisive, side]),
                    partial(_steer, design, concept, template, side, acts, rms[side], layers, grid, others,
                            directions, settings.seed),
                )
                for side in (0, 1)
            ]  # fmt: skip
            stacked = {name: np.stack([s[name] for s in sides]) for name in sides[0]}
            cost = stacked.pop("neutral_loss")
            steered = SteeredConcept(concept.name, concept.role, template, concept.stimuli.units, **stacked)
            found.append(steered)
            losses[cost_key(steered)] = cost
    return Gain(
        tuple(found), grid, small, layers, pair.base.n_layers, rms, losses, tuple(c.name for c in controls), directions,
        bound, settings, describe_design(design),
    )  # fmt: skip


def _check_doses(doses: Sequence[float], small: float) -> tuple[float, ...]:
    grid = tuple(sorted({float(dose) for dose in doses}))
    if not np.isfinite(grid).all():
        raise InputError(f"doses got {list(grid)}, expected finite numbers; leave the others out")
    near = [dose for dose in grid if 0 < abs(dose) <= small + 1e-12]
    if 0.0 not in grid or not near or sorted(-dose for dose in near) != near:
        raise InputError(
            f"doses got {list(grid)} with small ones up to {small}, expected 0 and small doses in pairs such as -0.1 and 0.1: only "
            "then does a bend not tilt the slope; add them"
        )
    return grid


_Acts = Mapping[tuple[str, int], Activations]


def _states(
    design: Design, template: str, layers: tuple[int, ...], store: Store, concepts: Sequence[Concept]
) -> _Acts:
    """Pooled states of every concept and of the neutral texts in both models."""
    names = dict.fromkeys([*(c.name for c in concepts), *(neutral_name(c) for c in concepts)])
    return {
        (name, side): extract(
            model,
            design.prompts[name, template][side],
            (SITE,),
            layers,
            store,
            label=f"{MODELS[side]} · {name}",
        )[SITE]
        for side, model in enumerate(design.pair.models)
        for name in names
    }


def _steer(
    design: Design,
    concept: Concept,
    template: str,
    side: int,
    acts: _Acts,
    rms: Float[np.ndarray, " layer"],
    layers: tuple[int, ...],
    doses: tuple[float, ...],
    controls: Sequence[Concept],
    directions: str,
    seed: int,
) -> dict[str, np.ndarray]:
    """Everything of one concept in one model."""
    model, stimuli = design.pair.models[side], concept.stimuli
    source = 0 if directions == "base" else side
    differences = scenario_differences(acts[concept.name, source], stimuli)
    folds = grouped_folds(stimuli.units, N_FOLDS, seed)
    fitted = cross_fitted_directions(differences, folds)
    place = {unit: i for i, unit in enumerate(stimuli.units)}
    unit_of = np.array([place[item.unit] for item in stimuli.items])
    asked = ask_design(design, concept, template, side)
    values, gradients = respond(
        model,
        asked,
        fitted[folds[unit_of]],
        layers,
        rms,
        doses,
        f"{MODELS[side]} · {template} · {concept.name}",
    )
    per_unit = np.eye(len(place))[unit_of] / np.bincount(unit_of)
    by_unit = np.einsum("iu,ldi->ldu", per_unit, values)
    slopes = np.einsum("iu,ilk->ulk", per_unit, gradients) * rms[:, None]
    rng = np.random.default_rng([seed, 17])
    neutral = acts[neutral_name(concept), source].normalised
    others = [scenario_differences(acts[c.name, source], c.stimuli).mean(0) for c in controls]
    pushed = unit_rows(np.stack(others)) if others else np.zeros((0, *fitted.shape[1:]))
    return {
        "readouts": by_unit,
        "coupling": scenario_coupling(values[0, doses.index(0.0)], stimuli),
        "tangents": np.einsum("ulk,ulk->lu", slopes, fitted[folds]),
        "random": random_slopes(slopes, neutral, rng),
        "shuffled": shuffled_slopes(slopes, differences, folds, rng),
        "controls": np.einsum("ulk,clk->lc", slopes, pushed) / len(slopes),
        "cosine": direction_cosine(differences, folds),
        "neutral_loss": neutral_cost(
            model, unit_rows(differences.mean(0)), layers, rms, doses, design.neutral
        ),
    }


def respond(
    model: Model,
    asked: Asked,
    directions: Float[np.ndarray, "item layer d_model"],
    layers: Sequence[int],
    rms: Float[np.ndarray, " layer"],
    doses: Sequence[float],
    label: str = "",
) -> tuple[Float[np.ndarray, "layer dose item"], Float[np.ndarray, "item layer d_model"]]:
    """Readout of every text at every dose of its own direction, and its gradient at dose 0.

    Args:
        model: steered at each text's read positions, after one layer at a time.
        asked: from `ask`, with this model's prompts.
        directions: unit vector of each text.
        layers: 0-based blocks.
        rms: what a dose of 1 adds at each.
        doses: in units of it; exactly 0 is the run as it is.
        label: shown beside the progress bar.

    Returns:
        Readouts in nats; and per text ∂readout/∂(vector added at its read positions), nats per raw activation unit.
    """
    values = np.zeros((len(layers), len(doses), len(asked.items)))
    gradients = np.zeros((len(asked.items), len(layers), model.d_model))
    moved = [i for i, dose in enumerate(doses) if dose]
    longest = max(len(p) + sum(map(len, asked.tails(i))) for i, p in enumerate(asked.prompts))
    # All doses of a layer are one replay.
    budget = max(longest, TOKEN_BUDGET // max(1, len(moved)))
    last = Site(model.n_layers - 1)
    sites = list(dict.fromkeys([*(Site(layer) for layer in layers), last]))
    with tqdm(total=len(asked.items), unit="text", desc=label, leave=False, disable=None) as bar:
        for index in asked_batches(asked, budget):
            batch = batch_asked(asked, index, model)
            here = _read_mask(asked, batch)
            with torch.no_grad():  # not inference_mode: a gradient follows
                run = model.run(batch.tokens, read=sites, capture=True)
                plain = look_up(model, batch, run.acts[last])
            for i, layer in enumerate(layers):
                state = run.acts[Site(layer)]
                own = torch.as_tensor(directions[list(index), i], dtype=torch.float32, device=state.device)
                push = (here[..., None] * own.repeat_interleave(batch.copies, 0)[:, None]) * float(rms[i])
                values[i][:, list(index)] = plain.cpu().numpy()
                if moved:
                    with torch.no_grad():
                        steered = torch.cat(
                            [(state.float() + doses[d] * push).to(state.dtype) for d in moved]
                        )
                        response = look_up(model, batch, _finish(model, run, steered, layer))
                    values[i][np.ix_(moved, list(index))] = response.view(len(moved), -1).cpu().numpy()
                gradients[list(index), i] = _gradient(model, run, batch, state, layer, here)
            bar.update(len(index))
    return values, gradients


def _finish(model: Model, run: Run, state: Tensor, layer: int) -> Tensor:
    """The state after the last block that follows from this one after `layer`."""
    last = Site(model.n_layers - 1)
    if layer == last.layer:
        return state
    return model.replay(run, state, layer, read=[last], last_layer=last.layer).acts[last]


def _gradient(
    model: Model, run: Run, batch: AskedBatch, state: Tensor, layer: int, here: Float[Tensor, "row pos"]
) -> Float[np.ndarray, "item d_model"]:
    with torch.enable_grad():
        leaf = state.detach().requires_grad_(True)
        total = look_up(model, batch, _finish(model, run, leaf, layer)).sum()
        (found,) = torch.autograd.grad(total, leaf)
    at_read = torch.einsum("rp,rpd->rd", here, found.float())
    per_item: Tensor = reduce(at_read, "(item copy) d -> item d", "sum", copy=batch.copies)
    return per_item.double().cpu().numpy()


def _read_mask(asked: Asked, batch: AskedBatch) -> Float[Tensor, "row pos"]:
    """1 at every read position."""
    mask = torch.zeros(batch.tokens.ids.shape, device=batch.tokens.ids.device)
    for k, item in enumerate(batch.index):
        for copy in range(batch.copies):
            mask[k * batch.copies + copy, list(asked.read[item])] = 1.0
    return mask


# ---------------------------------------------------------------- what other directions do


def random_slopes(
    slopes: Float[np.ndarray, "unit layer d_model"],
    neutral: Float[np.ndarray, "m layer d_model"],
    rng: np.random.Generator,
) -> Float[np.ndarray, "layer draw"]:
    """Mean slopes along unit directions drawn from N(0, Σ), Σ the covariance of neutral states."""
    found = np.empty((slopes.shape[1], NULLS))
    for i in range(slopes.shape[1]):
        x = neutral[:, i] - neutral[:, i].mean(0)
        found[i] = unit_rows(rng.standard_normal((NULLS, len(x))) @ x) @ slopes[:, i].mean(0)
    return found


def shuffled_slopes(
    slopes: Float[np.ndarray, "unit layer d_model"],
    differences: Float[np.ndarray, "unit layer d_model"],
    folds: Int[np.ndarray, " unit"],
    rng: np.random.Generator,
) -> Float[np.ndarray, "layer draw"]:
    """Mean slopes along cross-fitted directions of labels swapped at random within scenarios."""
    signs = rng.choice([-1.0, 1.0], (NULLS, len(differences)))
    found = np.zeros((slopes.shape[1], NULLS))
    for fold in range(int(folds.max()) + 1):
        train, test = folds != fold, folds == fold
        for i in range(slopes.shape[1]):
            wrong = unit_rows(signs[:, train] @ differences[train, i])
            found[i] += wrong @ slopes[test, i].sum(0) / len(slopes)
    return found


def neutral_cost(
    model: Model,
    directions: Float[np.ndarray, "layer d_model"],
    layers: Sequence[int],
    rms: Float[np.ndarray, " layer"],
    doses: Sequence[float],
    texts: Sequence[str],
) -> Float[np.ndarray, "layer dose"]:
    """Mean loss per token on neutral texts steered at every position, in nats; its exponential is the perplexity."""
    rows = [p.ids[: model.n_ctx] for p in render_texts(model.tokenizer, texts[:NEUTRAL_TEXTS])]
    rows = sorted((row for row in rows if len(row) > 1), key=len, reverse=True)
    losses, count = np.zeros((len(layers), len(doses))), 0
    step = max(1, TOKEN_BUDGET // (len(doses) * len(rows[0])))
    last = Site(model.n_layers - 1)
    for start in range(0, len(rows), step):
        batch = pad_tokens(rows[start : start + step], model.device)
        real = batch.mask[:, 1:].bool()
        count += int(real.sum())
        with torch.inference_mode():
            run = model.run(
                batch, read=[Site(layer) for layer in dict.fromkeys([*layers, last.layer])], capture=True
            )
            for i, layer in enumerate(layers):
                state = run.acts[Site(layer)]
                push = torch.as_tensor(directions[i] * rms[i], dtype=torch.float32, device=state.device)
                steered = torch.cat([(state.float() + dose * push).to(state.dtype) for dose in doses])
                for d, final in enumerate(_finish(model, run, steered, layer).split(len(state))):
                    logits = model.head(final[:, :-1][real]).float()
                    losses[i, d] += float(
                        torch.nn.functional.cross_entropy(logits, batch.ids[:, 1:][real], reduction="sum")
                    )
    return losses / count
