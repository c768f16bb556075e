"""Does what one model holds of a concept restore the other's answer?  Its component, put into the other's run, layer by layer.

The donor's state at a layer, carried over by the neutral-text map where the models' bases differ, takes the place of the recipient's
own along one direction: the donor's difference of means at the read position, from the folds that do not hold the scenario.
The readout is coupling; with c its mean over scenarios,

    repaired = (c_transplanted − c_recipient) / (c_donor − c_recipient)        0 nothing, 1 as the donor answers

with Fieller's interval, blank where the models' couplings are not told apart. A patch of a subspace can work through a path that
the model does not use by itself (Makelov et al. 2023), so beside it stand the full state, everything but the component, as
large a move along directions drawn from the covariance of neutral states, and the component of another scenario with the same label.
The frontier is the first layer whose repair exceeds the margin, as a confidence set of layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from empathy_probes import __version__
from empathy_probes.batches import Pool, pad_tokens
from empathy_probes.coding import scenario_contrasts
from empathy_probes.concepts import Concept
from empathy_probes.contrasts import LayerSet, onset_set
from empathy_probes.crossings import Crossing, fit_crossings, neutral_states
from empathy_probes.design import Design, Settings, describe_design, design_study
from empathy_probes.errors import InputError
from empathy_probes.interventions import Edit
from empathy_probes.models import Model
from empathy_probes.pairs import ModelPair
from empathy_probes.prompts import render_texts
from empathy_probes.readouts import (
    Asked,
    AskedBatch,
    ask_design,
    asked_batches,
    batch_asked,
    look_up,
    readable,
    scenario_coupling,
)
from empathy_probes.results import Result
from empathy_probes.sites import Site
from empathy_probes.stats import (
    Curve,
    critical_t,
    grouped_folds,
    largest_quantile,
    mean_interval,
    ratio_of_means,
    studentised_sums,
    unit_signs,
)
from empathy_probes.stimuli import StimulusSet
from empathy_probes.store import Store, digest_of, open_store
from empathy_probes.sweeps import STATE_BYTES, Continuation, check_continuable, continue_edited

ORDERS = ("base_into_aligned", "aligned_into_base")
POSITIONS = ("read", "all")
VARIANTS = ("concept", "full", "complement", "random", "shuffled")
"""The concept's component · the whole state · all but the component · the component's size along random directions · the
component of another scenario with the same label (at the read position only: texts of other lengths match nowhere else)."""
TRANSPLANT_COLUMNS = [
    "concept", "role", "template", "order", "position", "variant", "layer", "depth", "n_scenarios", "coupling", "coupling_lower", "coupling_upper",
    "repaired", "repaired_lower", "repaired_upper", "band_lower", "band_upper", "flags",
]  # fmt: skip
FRONTIER_COLUMNS = [
    "concept",
    "template",
    "order",
    "position",
    "frontier_lower",
    "frontier_upper",
    "flags",
]
N_FOLDS = 5
NEUTRAL_TEXTS = 100
PLACEBOS = 3
BATCH_TOKENS = 1024
SMALL_N = 60


@dataclass(frozen=True)
class TransplantedConcept:
    """One concept's couplings under one template, in nats, per unit."""

    concept: str
    role: str
    template: str
    units: tuple[str, ...]
    own: Float[np.ndarray, "model=2 unit"]
    """Of base and aligned as they are."""
    moved: Float[np.ndarray, "order=2 position=2 variant=5 layer unit"]
    """Of the recipient with a transplant after each layer, the first of them −1; `random` is the mean over its draws."""
    random: Float[np.ndarray, "order=2 position=2 draw layer unit"]
    """Every random direction's."""
    found: Bool[np.ndarray, "order=2 layer"]
    """Where the donor's mean difference is not 0: elsewhere the concept has no component to move."""

    def donor(self, order: int) -> Float[np.ndarray, " unit"]:
        """Coupling of the model that is taken from."""
        return self.own[order]

    def recipient(self, order: int) -> Float[np.ndarray, " unit"]:
        """Coupling of the model that is put into."""
        return self.own[1 - order]

    def gain(self, order: int) -> Float[np.ndarray, "position=2 variant=5 layer unit"]:
        """Coupling that each transplant adds to the recipient's."""
        return self.moved[order] - self.recipient(order)

    def repaired(self, order: int, critical: float | None = None) -> Curve:
        """`[position variant layer]`: share of the models' difference that comes with the transplant, Fieller's interval."""
        return ratio_of_means(self.gain(order), self.donor(order) - self.recipient(order), critical)

    def detected(self, order: int) -> bool:
        """Whether the models' couplings are told apart."""
        gap = self.donor(order) - self.recipient(order)
        return bool(np.isfinite(ratio_of_means(gap, gap).value))


@dataclass(frozen=True)
class Transplants(Result):
    """What one model's component of a concept does in the other's run."""

    concepts: tuple[TransplantedConcept, ...]
    n_layers: int
    mapped: Bool[np.ndarray, " layer"]
    """Where the neutral-text map carried states over; −1 first."""
    settings: Settings = field(default_factory=Settings)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What kind of result this is, also in saved files."""
        return "transplant"

    @property
    def layers(self) -> tuple[int, ...]:
        """−1, the input of block 0, and the blocks."""
        return tuple(range(-1, self.n_layers))

    def band(self, concept: TransplantedConcept, order: int) -> Curve:
        """`[position variant layer]`: repaired, with ends that hold at all layers of a curve at once (95 %)."""
        point = concept.repaired(order).value
        gap = concept.donor(order) - concept.recipient(order)
        signs = unit_signs(concept.units, self.settings.draws, self.settings.seed)
        gain = concept.gain(order)
        curves = np.full((3, *point.shape), np.nan)
        for place in np.ndindex(point.shape[:2]):
            if np.isnan(point[place]).any():
                continue
            influence = gain[place] - point[place][:, None] * gap
            draws = studentised_sums(influence - influence.mean(-1, keepdims=True), signs)
            # Never narrower than the pointwise interval, whatever the draws say.
            critical = max(float(critical_t(len(gap) - 1)), largest_quantile(draws))
            curve = ratio_of_means(gain[place], gap, critical)
            curves[(slice(None), *place)] = curve.value, curve.lower, curve.upper
        return Curve(*curves)

    def frontier(self, concept: TransplantedConcept, order: int, position: str) -> LayerSet | None:
        """First layer from which the concept's component repairs more than the margin: a 95 % set of layers.

        None where the models' couplings are not told apart.
        """
        if not concept.detected(order):
            return None
        gap = concept.donor(order) - concept.recipient(order)
        gain = concept.gain(order)[POSITIONS.index(position), VARIANTS.index("concept")]
        beyond = np.sign(gap.mean()) * (gain - self.settings.margin * gap)
        n = beyond.shape[-1]
        spread = beyond.std(-1, ddof=1) / np.sqrt(n)
        # A layer without any spread is known exactly.
        statistics = np.where(
            spread > 0, beyond.mean(-1) / np.where(spread > 0, spread, 1), np.sign(beyond.mean(-1)) * np.inf
        )
        signs = unit_signs(concept.units, self.settings.draws, self.settings.seed)
        draws = studentised_sums(beyond - beyond.mean(-1, keepdims=True), signs)
        return onset_set(statistics, draws, float(critical_t(n - 1)), self.layers)

    def to_frame(self) -> pd.DataFrame:
        """One row per concept, template, order, position, variant and layer: coupling in nats, `repaired` a share."""
        rows = []
        for c in self.concepts:
            for o, order in enumerate(ORDERS):
                coupling, share, band = mean_interval(c.moved[o]), c.repaired(o), self.band(c, o)
                for p, v, i in np.ndindex(share.value.shape):
                    flags = [] if c.detected(o) else ["difference_not_detected"]
                    flags += ["small_n"] if len(c.units) < SMALL_N else []
                    flags += ["mapped"] if self.mapped[i] else []
                    flags += ["no_component"] if VARIANTS[v] != "full" and not c.found[o, i] else []
                    flags += ["lengths_differ"] if np.isnan(c.moved[o, p, v, i]).any() else []
                    rows.append(
                        {
                            "concept": c.concept, "role": c.role, "template": c.template, "order": order, "position": POSITIONS[p],
                            "variant": VARIANTS[v], "layer": self.layers[i], "depth": (self.layers[i] + 1) / self.n_layers,
                            "n_scenarios": len(c.units), **coupling.cells("coupling", (p, v, i)), **share.cells("repaired", (p, v, i)),
                            "band_lower": band.lower[p, v, i], "band_upper": band.upper[p, v, i], "flags": ";".join(flags),
                        }
                    )  # fmt: skip
        return pd.DataFrame(rows, columns=TRANSPLANT_COLUMNS)

    def frontier_frame(self) -> pd.DataFrame:
        """First and last member of every frontier set; the last is blank where it may not repair at any layer."""
        rows = []
        for c in self.concepts:
            for o, order in enumerate(ORDERS):
                for position in POSITIONS:
                    found = self.frontier(c, o, position)
                    flags = ["difference_not_detected"] if found is None else []
                    flags += ["may_not_repair"] if found is not None and found.includes_none else []
                    rows.append(
                        {
                            "concept": c.concept, "template": c.template, "order": order, "position": position,
                            "frontier_lower": None if found is None else found.lower,
                            "frontier_upper": None if found is None else found.upper, "flags": ";".join(flags),
                        }
                    )  # fmt: skip
        frame = pd.DataFrame(rows, columns=FRONTIER_COLUMNS)
        return frame.astype({"frontier_lower": "Int64", "frontier_upper": "Int64"})


def transplant(
    pair: ModelPair,
    concepts: Concept | Sequence[Concept],
    controls: Concept | Sequence[Concept] = (),
    *,
    template: str = "both",
    margin: float = 0.10,
    draws: int = 1000,
    seed: int = 0,
    neutral: Sequence[str] | None = None,
    store: str | None = None,
) -> Transplants:
    """Put each model's component of a concept into the other's run, at every layer, and see whether its answer comes along.

    Args:
        pair: base and aligned model.
        concepts: targets, each with a readout.
        controls: contrasts with a readout of their own; those without are left out.
        template: raw, shared or both.
        margin: repair that counts, for the frontier.
        draws: multiplier draws behind every band.
        seed: of the draws, the folds, the random directions and the shuffling.
        neutral: texts for the map and the covariance; the shipped ones by default.
        store: where readouts are kept; the default one if None.

    Raises:
        InputError: no concept has a readout, or a model cannot be continued from a state.
    """
    design = design_study(pair, concepts, controls, template=template, neutral=neutral)
    return transplant_design(design, Settings(margin=margin, draws=draws, seed=seed), open_store(store))


def transplant_design(design: Design, settings: Settings, store: Store) -> Transplants:
    """Transplant a design's concepts; what is in the store is not computed again."""
    pair = design.pair
    for model in pair.models:
        check_continuable(model)
    if "own" in design.templates:
        raise InputError(
            "transplant got the template 'own', expected the same tokens in both models; use --template raw or shared"
        )
    texts = design.neutral[:NEUTRAL_TEXTS]
    tokens = [prompt.ids for prompt in render_texts(pair.base.tokenizer, texts) if len(prompt.ids) > 1]

    @cache
    def ways() -> tuple[list[tuple[Sequence[Crossing], np.ndarray]], Bool[np.ndarray, " layer"]]:
        """Per order what carries states over and draws with the recipient's neutral covariance; and which layers are mapped."""
        states = (neutral_states(pair.base, tokens), neutral_states(pair.aligned, tokens))
        (to_base, to_aligned), mapped = fit_crossings(states)
        drawn = [_random_directions(x, settings.seed) for x in states]
        return [(to_aligned, drawn[1]), (to_base, drawn[0])], mapped

    def readouts(concept: Concept, asked: Asked, order: int, label: str) -> dict[str, np.ndarray]:
        donor, recipient = pair.models[order], pair.models[1 - order]
        crossings, directions = ways()[0][order]
        plan = plan_transplant(donor, concept.stimuli, asked, crossings, directions, settings.seed)
        plain, values = transplanted_readouts(donor, recipient, asked, crossings, plan, label)
        return {"plain": plain, "values": values, "found": plan.found}

    decisive = ["transplant", __version__, pair.base.fingerprint, pair.aligned.fingerprint, settings.seed, [list(row) for row in tokens]]  # fmt: skip
    mapped = store.remember(digest_of([*decisive, "mapped"]), lambda: ways()[1])
    found = []
    for template in design.templates:
        for concept in readable(design):
            asked = ask_design(design, concept, template, 1)
            own, parts = np.zeros((2, concept.stimuli.n_scenarios)), []
            for order, name in enumerate(ORDERS):
                label = f"transplant · {template} · {concept.name} · {name}"
                read = store.remember_all(
                    digest_of([*decisive, concept.digest, asked.digest, name]),
                    partial(readouts, concept, asked, order, label),
                )
                own[1 - order] = scenario_coupling(read["plain"], concept.stimuli)
                coupling = scenario_coupling(np.moveaxis(read["values"], -1, 0), concept.stimuli)
                parts.append((np.moveaxis(coupling, 0, -1), read["found"]))
            moved = np.stack([part for part, _ in parts])
            random = moved[:, :, len(VARIANTS) - 1 :]
            shown = np.concatenate([moved[:, :, :3], random.mean(2, keepdims=True), moved[:, :, 3:4]], 2)
            found.append(
                TransplantedConcept(
                    concept.name, concept.role, template, concept.stimuli.units, own, np.ascontiguousarray(shown), np.ascontiguousarray(random),
                    np.stack([part for _, part in parts]),
                )
            )  # fmt: skip
    return Transplants(tuple(found), pair.base.n_layers, mapped, settings, describe_design(design))


@dataclass(frozen=True)
class Plan:
    """What is moved along which direction, for every text."""

    fold: Int[np.ndarray, " item"]
    directions: Float[np.ndarray, "fold layer d_model"]
    """Unit vectors in the recipient's basis; 0 where the donor's mean difference is 0."""
    random: Float[np.ndarray, "draw layer d_model"]
    """Unit vectors."""
    shuffled: Float[np.ndarray, "item layer"]
    """Component of another scenario's text with the same label."""
    found: Bool[np.ndarray, " layer"]


def plan_transplant(
    donor: Model,
    stimuli: StimulusSet,
    asked: Asked,
    crossings: Sequence[Crossing],
    random: Float[np.ndarray, "draw layer d_model"],
    seed: int,
) -> Plan:
    """Cross-fitted directions: each text's comes from the scenarios of other folds."""
    acts = _read_states(donor, asked)
    differences = scenario_contrasts(acts, stimuli)[0]
    units = stimuli.units
    of_unit = grouped_folds(units, N_FOLDS, seed)
    fold = np.array([of_unit[units.index(item.unit)] for item in stimuli.items])
    means = np.stack([differences[of_unit != f].mean(0) for f in range(N_FOLDS)])
    turned = np.stack([crossing.turn(means[:, i]) for i, crossing in enumerate(crossings)], 1)
    size = np.linalg.norm(turned, axis=-1, keepdims=True)
    # Rounding aside, texts that end alike have the same embedding there: nothing points anywhere.
    found = size > 1e-6 * np.linalg.norm(acts, axis=-1).mean(0)[None, :, None]
    directions = np.where(found, turned / np.where(found, size, 1), 0.0)
    other = _of_another_scenario(stimuli, seed)
    carried = np.stack([crossing.move(acts[other, i]) for i, crossing in enumerate(crossings)], 1)
    shuffled = np.einsum("ild,ild->il", carried, directions[fold])
    return Plan(fold, directions, random, shuffled, found.all(0)[:, 0])


def _read_states(model: Model, asked: Asked) -> Float[np.ndarray, "item layer d_model"]:
    """States at the read position of every prompt, −1 first."""
    sites = [Site(layer) for layer in range(-1, model.n_layers)]
    found = np.zeros((len(asked.items), len(sites), model.d_model))
    for index in asked_batches(asked):
        batch = pad_tokens([asked.prompts[i] for i in index], model.device)
        with torch.inference_mode():
            pool = Pool.of([asked.read[i] for i in index], batch)
            run = model.run(batch, read=sites, last_layer=model.n_layers - 1, pool=pool)
            found[list(index)] = torch.stack([run.acts[site] for site in sites], 1).double().cpu().numpy()
    return found


def _of_another_scenario(stimuli: StimulusSet, seed: int) -> Int[np.ndarray, " item"]:
    """For every text one with the same label (the nearest, where labels are grades) of the scenario next in a random order."""
    units = list(stimuli.units)
    order = np.random.default_rng(seed).permutation(len(units))
    following = {units[a]: units[b] for a, b in zip(order, np.roll(order, -1), strict=True)}
    of_unit: dict[str, list[int]] = {}
    for i, item in enumerate(stimuli.items):
        of_unit.setdefault(item.unit, []).append(i)
    return np.array(
        [
            min(of_unit[following[item.unit]], key=lambda j: abs(float(stimuli.items[j].label) - float(item.label)))
            for item in stimuli.items
        ]
    )  # fmt: skip


def _random_directions(
    states: Float[np.ndarray, "token layer d_model"], seed: int
) -> Float[np.ndarray, "draw layer d_model"]:
    """Unit vectors from N(0, Σ) with Σ the covariance of neutral states at each layer."""
    weights = np.random.default_rng(seed).standard_normal((PLACEBOS, len(states)))
    drawn = np.einsum("kt,tld->kld", weights, states - states.mean(0))
    return drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)


def transplanted_readouts(
    donor: Model,
    recipient: Model,
    asked: Asked,
    crossings: Sequence[Crossing],
    plan: Plan,
    label: str = "",
) -> tuple[Float[np.ndarray, " item"], Float[np.ndarray, "position=2 kind layer item"]]:
    """Readout of every item in the recipient as it is, and with every transplant.

    Kinds: concept, full, complement, shuffled (NaN at all positions), then one per random direction.
    """
    n = recipient.n_layers
    sites = [Site(layer) for layer in range(-1, n)]
    n_kinds = len(VARIANTS) - 1 + len(plan.random)
    plain = np.zeros(len(asked.items))
    values = np.full((len(POSITIONS), n_kinds, n + 1, len(asked.items)), np.nan)
    longest = max(len(asked.prompts[i]) + sum(map(len, asked.tails(i))) for i in range(len(asked.items)))
    budget = max(longest, min(BATCH_TOKENS, STATE_BYTES // (8 * (n + 1) * recipient.d_model)))
    with tqdm(total=len(asked.items), unit="text", desc=label, leave=False, disable=None) as bar:
        for index in asked_batches(asked, budget):
            batch = batch_asked(asked, index, donor, recipient)
            with torch.inference_mode():
                theirs = donor.run(batch.tokens, read=sites, last_layer=n - 1).acts
                run = recipient.run(batch.tokens, read=sites, last_layer=n - 1, capture=True)
                plain[list(index)] = look_up(recipient, batch, run.acts[Site(n - 1)]).cpu().numpy()
                keys, going = [], []
                for position in range(len(POSITIONS)):
                    where = _where(batch, asked, index, POSITIONS[position])
                    for layer in range(-1, n):
                        edits = _edits(theirs[Site(layer)], crossings[layer + 1], plan, layer + 1, index, batch, where,
                                       shuffle=POSITIONS[position] == "read")  # fmt: skip
                        for kind, edit in edits:
                            keys.append((position, kind, layer + 1))
                            going.append(Continuation(layer, edit))
                states = {layer: run.acts[Site(layer)] for layer in range(-1, n)}
                read = continue_edited(recipient, batch, run, states, going)
            for key, row in zip(keys, read, strict=True):
                values[(*key, list(index))] = row
            bar.update(len(index))
    return plain, values


def _where(
    batch: AskedBatch, asked: Asked, index: Sequence[int], position: str
) -> Bool[Tensor, "row pos one=1"]:
    """Positions that are edited."""
    if position == "all":
        return torch.ones_like(batch.tokens.ids, dtype=torch.bool)[..., None]
    where = torch.zeros_like(batch.tokens.ids, dtype=torch.bool)
    for k, item in enumerate(index):
        for copy in range(batch.copies):
            where[batch.copies * k + copy, list(asked.read[item])] = True
    return where[..., None]


def _edits(
    theirs: Float[Tensor, "row pos d"],
    crossing: Crossing,
    plan: Plan,
    at: int,
    index: Sequence[int],
    batch: AskedBatch,
    where: Bool[Tensor, "row pos one=1"],
    *,
    shuffle: bool,
) -> list[tuple[int, Edit]]:
    """Every kind of transplant of one layer and choice of positions."""
    items = np.repeat(np.array(index), batch.copies)
    device = theirs.device
    direction = torch.as_tensor(plan.directions[plan.fold[items], at], dtype=theirs.dtype, device=device)[:, None]  # fmt: skip
    other = torch.as_tensor(plan.shuffled[items, at], dtype=theirs.dtype, device=device)[:, None, None]
    random = torch.as_tensor(plan.random[:, at], dtype=theirs.dtype, device=device)

    def along(own: Tensor) -> tuple[Tensor, Tensor]:
        """The donor's state less the recipient's own, and how much of that lies along the concept."""
        gap = crossing(theirs, own) - own
        return gap, (gap * direction).sum(-1, keepdim=True)

    def concept(own: Tensor) -> Tensor:
        return own + torch.where(where, along(own)[1] * direction, 0.0)

    def full(own: Tensor) -> Tensor:
        return own + torch.where(where, along(own)[0], 0.0)

    def complement(own: Tensor) -> Tensor:
        gap, size = along(own)
        return own + torch.where(where, gap - size * direction, 0.0)

    def shuffled(own: Tensor) -> Tensor:
        size = other - (own * direction).sum(-1, keepdim=True)
        return own + torch.where(where, size * direction, 0.0)

    def randomly(vector: Tensor) -> Edit:
        return lambda own: own + torch.where(where, along(own)[1] * vector, 0.0)

    kinds: list[tuple[int, Edit]] = [(0, concept), (1, full), (2, complement)]
    kinds += [(3, shuffled)] if shuffle else []
    return [*kinds, *((4 + k, randomly(vector)) for k, vector in enumerate(random))]


TYPES = {cls.__name__: cls for cls in (Transplants, TransplantedConcept, Settings)}
