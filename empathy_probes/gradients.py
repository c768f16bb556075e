"""Patching estimated from gradients, and how far the estimate can be trusted: its top and a sample of the rest are patched exactly.

To first order, putting activation a' of the other text in place of a moves the readout by (a' − a)·∂y/∂a (Nanda 2023; Syed et al. 2023).
One forward and one backward pass give it at every site and position: a zero tensor is added at each site, and its gradient is
the site's. With steps, the gradient is averaged along the straight path of the input of block 0 from the text's own to its partner's
matched tokens (midpoint rule), which leaves saturated places (Sundararajan et al. 2017; Hanna et al. 2024).
Nothing guarantees a first-order estimate: the result keeps both numbers wherever it was checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy import stats as distributions
from torch import Tensor

from empathy_probes.concepts import Concept
from empathy_probes.design import describe_model
from empathy_probes.errors import InputError
from empathy_probes.interventions import Edit
from empathy_probes.models import Model
from empathy_probes.readouts import look_up
from empathy_probes.results import Result
from empathy_probes.roles import ALL
from empathy_probes.sites import Site
from empathy_probes.stats import Curve, Estimate, ratio_of_means
from empathy_probes.stimuli import ReadoutSpec
from empathy_probes.sweeps import (
    Cell,
    Place,
    check_continuable,
    directions_of,
    grid_of,
    pair_batches,
    patched_readouts,
    place_cells,
    take,
)
from empathy_probes.textpairs import TextPairs, as_concepts, prepare_pairs, unit_means

ESTIMATE_COLUMNS = [
    "concept", "template", "model", "direction", "site", "layer", "head", "position", "estimated", "estimated_lower", "estimated_upper",
    "exact", "exact_lower", "exact_upper", "checked", "flags",
]  # fmt: skip
# A backward pass holds every block's activations.
GRADIENT_TOKENS = 512
LEVEL = 0.95
AGREEMENT_DRAWS = 499


@dataclass(frozen=True)
class EstimatedConcept:
    """What gradients say of one concept in one model and direction, and what patching says where it was checked."""

    concept: str
    template: str
    model: str
    direction: str
    places: tuple[Place, ...]
    scenarios: tuple[str, ...]
    """Of every pair."""
    pair_units: tuple[str, ...]
    clean: Float[np.ndarray, " pair"]
    corrupted: Float[np.ndarray, " pair"]
    estimated: Float[np.ndarray, "place pair"]
    """How far each patch would go towards the other run, in nats; NaN where no text has a token of this role."""
    checked: Int[np.ndarray, " check"]
    """Places that were patched: the largest estimates, then a random sample of the rest."""
    exact: Float[np.ndarray, "check pair"]
    """How far each of them goes, in nats."""
    n_top: int
    """How many of `checked` are the largest."""

    def per_unit(self, values: Float[np.ndarray, "*axes pair"]) -> Float[np.ndarray, "*axes unit"]:
        """Means over the pairs of each unit."""
        return unit_means(values, self.scenarios, self.pair_units)

    @property
    def effect(self) -> Float[np.ndarray, " unit"]:
        """clean − corrupted, in nats."""
        return self.per_unit(self.clean - self.corrupted)

    @property
    def shares(self) -> Curve:
        """`[place]`: estimated share of the effect, Fieller's 95 % interval over scenarios."""
        return ratio_of_means(self.per_unit(self.estimated), self.effect)

    @property
    def exact_shares(self) -> Curve:
        """`[check]`: share recovered by exact patching."""
        return ratio_of_means(self.per_unit(self.exact), self.effect)

    @property
    def misses(self) -> Float[np.ndarray, " check"]:
        """estimated − exact, as a share of the effect, where it was checked; NaN where the effect is not detected."""
        return self.shares.value[self.checked] - self.exact_shares.value

    @property
    def worst_top(self) -> float:
        """The largest miss among the largest estimates, as a share of the effect; NaN where no place has tokens."""
        top = np.abs(self.misses[: self.n_top])
        return float(top.max()) if len(top) else np.nan

    @property
    def worst_rest(self) -> float:
        """The largest miss in the random sample of the rest, as a share of the effect; NaN where there is no rest."""
        rest = np.abs(self.misses[self.n_top :])
        return float(rest.max()) if len(rest) else np.nan

    @property
    def exceeding(self) -> float:
        """At most this share of the places that were not checked misses by more than `worst_rest`, with 95 % confidence.

        Of m places drawn at random without one beyond, the share q beyond is bounded by (1 − q)^m ≥ 0.05. 0 where all were checked,
        1 where nothing but the largest was.
        """
        sampled = len(self.checked) - self.n_top
        if not self._unchecked:
            return 0.0
        return 1 - (1 - LEVEL) ** (1 / sampled) if sampled else 1.0

    @property
    def _unchecked(self) -> int:
        """Places that were estimated and not patched."""
        return int(np.isfinite(self.estimated).all(-1).sum()) - len(self.checked)

    @property
    def agreement(self) -> Estimate:
        """Spearman's rank correlation of estimated and exact over the checked places, percentile bootstrap over units.

        A rank is no smooth function of a mean, so that a jackknife would be wrong. Shares are rounded to a millionth
        first: places where nothing can move would otherwise be ranked by rounding errors. NaN below two places that differ.
        """
        a, b = self.per_unit(self.estimated[self.checked]), self.per_unit(self.exact)
        n, scale = a.shape[-1], max(float(np.abs(self.effect.mean())), 1e-9)
        if len(self.checked) < 2:
            return Estimate(np.nan, np.nan, np.nan, n)
        chosen = np.random.default_rng(0).integers(0, n, (AGREEMENT_DRAWS, n))
        weights = np.concatenate(
            [np.full((1, n), 1 / n), np.stack([np.bincount(row, minlength=n) / n for row in chosen])]
        )
        ranks = [distributions.rankdata(np.round(weights @ x.T / scale, 6), axis=-1) for x in (a, b)]
        x, y = (r - r.mean(-1, keepdims=True) for r in ranks)
        size = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
        if not size.all():
            return Estimate(np.nan, np.nan, np.nan, n)
        value, *drawn = (x * y).sum(-1) / size
        low, high = np.quantile(drawn, [0.025, 0.975])
        return Estimate(float(value), min(float(low), float(value)), max(float(high), float(value)), n)

    @property
    def sentence(self) -> str:
        """What the check found."""
        name = f"{self.concept}, {self.model}, {self.direction}"
        if not len(self.checked):
            return f"{name}: no text has a token at the places asked for, so nothing was estimated"
        agreement, sampled = self.agreement, len(self.checked) - self.n_top
        ranks = (
            f"{agreement.value:.2f} [{agreement.lower:.2f}, {agreement.upper:.2f}]"
            if np.isfinite(agreement.value)
            else "not defined without two places that differ"
        )
        found = (
            f"{name}: rank agreement with exact patching {ranks} over {len(self.checked)} place{'s' * (len(self.checked) > 1)}, "
            f"n = {agreement.n} scenarios"
        )
        if np.isnan(self.worst_top):
            return f"{found}; the effect is not detected, so a miss is no share of it"
        unit = "of the effect"
        if sampled:
            rest = (
                f"largest miss in a sample of {sampled} others {self.worst_rest:.2f} {unit} (95 %: at most {self.exceeding:.0%} of the "
                "unchecked miss by more)"
            )
        else:
            rest = f"none of the other {self._unchecked} was checked" if self._unchecked else "nothing else was left to check"  # fmt: skip
        return f"{found}; largest miss among the top {self.n_top} {self.worst_top:.2f} {unit}, {rest}"


@dataclass(frozen=True)
class EstimatedPatching(Result):
    """Patching of every place estimated from gradients, with its check."""

    concepts: tuple[EstimatedConcept, ...]
    n_layers: int
    steps: int
    """Points on the path of the input; 0: the gradient at the text itself."""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What kind of result this is, also in saved files."""
        return "attribution_patching"

    def to_frame(self) -> pd.DataFrame:
        """One row per place: `estimated` and `exact` are shares of the effect; `checked` is top, sample or blank."""
        rows = []
        for c in self.concepts:
            estimated, exact = c.shares, c.exact_shares
            where = {int(place): i for i, place in enumerate(c.checked)}
            detected = np.isfinite(ratio_of_means(c.effect, c.effect).value)
            for j, place in enumerate(c.places):
                row: dict[str, Any] = {
                    "concept": c.concept, "template": c.template, "model": c.model, "direction": c.direction, **place_cells(place),
                    **estimated.cells("estimated", j),
                    "checked": "", "flags": ";".join((*(() if detected else ("effect_not_detected",)), *place.flags)),
                }  # fmt: skip
                if j in where:
                    i = where[j]
                    row |= exact.cells("exact", i) | {"checked": "top" if i < c.n_top else "sample"}
                rows.append(row)
        frame = pd.DataFrame(rows, columns=ESTIMATE_COLUMNS).astype({"head": "Int64"})
        frame.attrs["n_scenarios"] = {
            c.concept: len(c.per_unit(c.clean)) for c in self.concepts
        }  # for the figure
        return frame


def attribution_patch(
    model: Model,
    concepts: Concept | Sequence[Concept] | Sequence[tuple[str, str]],
    *,
    readout: ReadoutSpec | None = None,
    sites: Sequence[Site] | None = None,
    positions: Sequence[str] | None = None,
    direction: str = "both",
    template: str = "raw",
    steps: int = 0,
    top: int = 10,
    sample: int = 20,
    seed: int = 0,
) -> EstimatedPatching:
    """Estimate the patch of every place from gradients, and patch the largest and a random sample of the rest exactly.

    Args:
        model: runs.
        concepts, readout, sites, positions, direction, template: as in `patch`.
        steps: points on the path of the input over which gradients are averaged; 0 takes the gradient at the text itself.
        top: how many of the largest estimates are checked.
        sample: how many of the others.
        seed: of the sample.

    Raises:
        InputError: as `patch`; a negative number of steps; nothing is checked.
    """
    check_continuable(model)
    if steps < 0 or top < 1 or sample < 0:
        raise InputError(
            f"steps, top and sample got {steps}, {top} and {sample}, expected none below 0 and top at least 1; an estimate that is not "
            "checked says nothing"
        )
    found = []
    asked_for = as_concepts(concepts)
    for concept in asked_for:
        prepared, pairs = prepare_pairs(model, concept, readout, template)
        cells, places = grid_of(model, pairs, prepared.name, sites, positions)
        for way in directions_of(direction):
            found.append(
                _estimate(
                    model, pairs, cells, places, (prepared.name, template, model.name, way), steps,
                    (top, sample), seed,
                )
            )  # fmt: skip
    described = {"model": describe_model(model), "concepts": {c.name: {"digest": c.digest, "n_scenarios": c.stimuli.n_scenarios} for c in asked_for},
                 "top": top, "sample": sample, "seed": seed}  # fmt: skip
    return EstimatedPatching(tuple(found), model.n_layers, steps, described)


def _estimate(
    model: Model,
    pairs: TextPairs,
    cells: Sequence[Cell],
    places: tuple[Place, ...],
    name: tuple[str, str, str, str],
    steps: int,
    check: tuple[int, int],
    seed: int,
) -> EstimatedConcept:
    concept, template, model_name, way = name
    plain, change = estimated_changes(model, pairs, cells, way, steps)
    # Towards the other run: up for denoise, down for noise.
    sign = 1.0 if way == "denoise" else -1.0
    estimated = sign * change
    estimated[[i for i, place in enumerate(places) if "no_tokens" in place.flags]] = np.nan
    size = np.abs(unit_means(estimated, pairs.scenarios, pairs.units).mean(-1))
    known = np.flatnonzero(np.isfinite(size))
    order = known[np.argsort(-size[known], kind="stable")]
    largest, rest = order[: check[0]], order[check[0] :]
    drawn = np.random.default_rng(seed).choice(rest, min(check[1], len(rest)), replace=False)
    checked = np.concatenate([largest, np.sort(drawn)]).astype(int)
    again, patched = patched_readouts(model, pairs, [cells[i] for i in checked], way)
    theirs, _ = patched_readouts(model, pairs, (), "noise" if way == "denoise" else "denoise")
    clean, corrupted = (theirs, plain) if way == "denoise" else (plain, theirs)
    return EstimatedConcept(
        concept, template, model_name, way, places, pairs.scenarios, pairs.units, clean, corrupted, estimated,
        checked, sign * (patched - again), len(largest),
    )  # fmt: skip


def estimated_changes(
    model: Model, pairs: TextPairs, cells: Sequence[Cell], direction: str, steps: int = 0
) -> tuple[Float[np.ndarray, " pair"], Float[np.ndarray, "cell pair"]]:
    """Readout of every text put into, and to first order how far each cell's patch would move it, in nats."""
    n = model.n_layers
    last = Site(n - 1)
    sites = list(dict.fromkeys(site for cell in cells for site in cell.sites))
    plain, change = np.zeros(len(pairs.clean)), np.zeros((len(cells), len(pairs.clean)))
    positions = [*(cell.position for cell in cells), ALL]
    for batch in pair_batches(model, pairs, direction, positions, GRADIENT_TOKENS):
        with torch.no_grad():
            read = list(dict.fromkeys([*sites, Site(-1)]))
            deepest = max(0, *(site.layer for site in read))
            theirs = model.run(batch.source, read=read, last_layer=deepest).acts
            own = model.run(batch.target.tokens, read=[*read, *([last] if last not in read else [])], last_layer=n - 1).acts  # fmt: skip
            plain[list(batch.index)] = look_up(model, batch.target, own[last]).cpu().numpy()
            goal = take(theirs[Site(-1)], batch.moves[ALL])(own[Site(-1)])
        gradients: dict[Site, Tensor] = {}
        for step in range(max(steps, 1)):
            share = (step + 0.5) / steps if steps else 0.0
            zeros = {site: torch.zeros_like(own[site]).requires_grad_() for site in sites}
            write: dict[Site, Edit] = {site: _plus(zero) for site, zero in zeros.items()}
            inner = write.get(Site(-1))
            if steps:
                write[Site(-1)] = _toward(goal, share, inner)
            with torch.enable_grad():
                run = model.run(batch.target.tokens, read=[last], write=write, last_layer=n - 1)
                total = look_up(model, batch.target, run.acts[last]).sum()
                found = torch.autograd.grad(total, [zeros[site] for site in sites])
            for site, gradient in zip(sites, found, strict=True):
                gradients[site] = gradients.get(site, torch.zeros_like(gradient)) + gradient / max(steps, 1)
        for i, cell in enumerate(cells):
            moves = batch.moves[cell.position]
            for site in cell.sites:
                gap = theirs[site][moves.source_rows, moves.sources] - own[site][moves.rows, moves.targets]
                each = (gap * gradients[site][moves.rows, moves.targets]).double().sum(-1)
                sums = torch.zeros(len(batch.index), dtype=torch.float64, device=each.device)
                sums.index_add_(0, moves.source_rows, each)
                change[i, list(batch.index)] += sums.cpu().numpy()
    return plain, change


def _plus(zero: Tensor) -> Edit:
    def edit(acts: Tensor) -> Tensor:
        return acts + zero

    return edit


def _toward(goal: Tensor, share: float, then: Edit | None) -> Edit:
    """A state on the way to another."""

    def edit(acts: Tensor) -> Tensor:
        moved = acts + share * (goal - acts)
        return moved if then is None else then(moved)

    return edit


TYPES = {cls.__name__: cls for cls in (EstimatedPatching, EstimatedConcept, Place)}
