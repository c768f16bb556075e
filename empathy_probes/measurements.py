"""One concept in both models, under one template at one site: everything its numbers are computed from.

Per scenario the two labels' activations are subtracted; the Gram matrix of these differences, in units of each model's
own rms, is all that strength needs (section 2 of the method). Beside it stand other views of the same activations:
crossnobis kernels, cross-model kernels, out-of-fold probe scores within and across models, nested log-losses, and what
shuffled labels and random directions give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from empathy_probes.activations import Activations
from empathy_probes.alignment import fit_map
from empathy_probes.concepts import Concept
from empathy_probes.contrasts import Contrast, compare
from empathy_probes.geometry import transfer, whitened_kernels, whitening_covariance
from empathy_probes.kernels import cross_kernels, strength_kernels
from empathy_probes.nulls import DRAWS, direction_gaps, largest_p, permutation_aurocs
from empathy_probes.probes import N_FOLDS, cross_fitted_losses, cross_fitted_scores
from empathy_probes.stats import auroc, auroc_difference, grouped_folds
from empathy_probes.stimuli import StimulusSet


@dataclass(frozen=True)
class Views:
    """The same concept seen otherwise; float32 like the kernels of strength."""

    whitened: Float[np.ndarray, "model=2 layer n n"]
    """D W Dᵀ, W the inverse covariance of neutral texts in each model: its strength is crossnobis d′."""
    whitening: Float[np.ndarray, "model=2 model=2 layer"]
    """Covariance of the two U of `whitened` that comes from the choice of neutral texts."""
    cross: Float[np.ndarray, "mapped=2 layer n n"]
    """<D_base,s, D_aligned,t>: as the states are, and with the base's carried over by the neutral-text map."""
    losses: Float[np.ndarray, "model=2 layer unit"]
    """Log-loss in bits of a nested probe, per scenario."""
    transfer: Float[np.ndarray, "mapped=2 fitted=2 layer item"]
    """Out-of-fold scores of each model's probe on the other's states, plain and mapped."""
    map_error: Float[np.ndarray, " layer"]
    """Share of neutral variance that the map misses on texts it was not fitted on."""
    shuffled_p: Float[np.ndarray, "model=2 layer"]
    """Of each model's AUROC among shuffled labels, the largest over layers of each shuffle."""
    random_p: Float[np.ndarray, "model=2 layer"]
    """Of the labels' gap among random directions of the neutral texts' covariance."""
    map_underdetermined: bool
    """Fewer neutral texts than dimensions."""


@dataclass(frozen=True)
class Measurement:
    """One concept in both models, under one template at one site."""

    concept: str
    role: str
    template: str
    site: str
    layers: tuple[int, ...]
    units: tuple[str, ...]
    """The scenarios (or clusters), in the order of the kernels."""
    kernels: Float[np.ndarray, "model=2 layer n n"]
    """D Dᵀ per model (base, aligned) and layer; float32, and every number is computed from these."""
    items: tuple[str, ...]
    item_units: tuple[str, ...]
    labels: Int[np.ndarray, " item"]
    scores: Float[np.ndarray, "model=2 layer item"]
    """Out-of-fold probe scores of every text."""
    text_scores: Float[np.ndarray, " item"]
    """Out-of-fold scores of the bag of words."""

    directions: Float[np.ndarray, "model=2 layer d_model"]
    """Difference of means, label 1 minus label 0, in each model's raw activation units."""
    rms: Float[np.ndarray, "model=2 layer"]
    """Root mean square norm of each model's pooled activations: the unit of strength."""

    views: Views
    same_model: bool = False
    """Both models have equal weights."""

    @property
    def key(self) -> str:
        """Names the measurement, also in saved files."""
        return f"{self.concept}/{self.template}/{self.site}"

    @cached_property
    def contrast(self) -> Contrast:
        """Strength in both models and what became of it."""
        keys = [f"{self.concept}\x1f{unit}" for unit in self.units]
        return compare(
            self.concept, keys, self.kernels.astype(np.float64), self.layers, same_model=self.same_model
        )

    @cached_property
    def separation(self) -> Contrast:
        """The same comparison of crossnobis d′."""
        keys = [f"{self.concept}\x1f{unit}" for unit in self.units]
        kernels = self.views.whitened.astype(np.float64)
        return compare(
            self.concept, keys, kernels, self.layers, same_model=self.same_model, extra=self.views.whitening
        )

    @cached_property
    def beats_words(self) -> Bool[np.ndarray, " layer"]:
        """Layers at which the base's probe exceeds the bag of words beyond chance."""
        words = np.broadcast_to(self.text_scores, self.scores[0].shape)
        return auroc_difference(words, self.scores[0], self.labels, self.item_units).lower > 0


def measure_concept(
    concept: Concept,
    template: str,
    acts: Sequence[Activations],
    neutral: Sequence[Activations],
    text_scores: Float[np.ndarray, " item"],
    seed: int,
    same_model: bool,
    null_draws: int = DRAWS,
) -> Measurement:
    """Reduce a concept's activations in both models, and those of the neutral texts, to a measurement.

    Args:
        concept: binary.
        template: what the prompts were rendered with.
        acts: of the base and of the aligned model.
        neutral: the same of neutral texts.
        text_scores: out-of-fold scores of the bag of words.
        seed: of folds and draws.
        same_model: both models have equal weights.
        null_draws: shuffles and random directions.
    """
    stimuli = concept.stimuli
    labels, units = stimuli_labels(stimuli), [item.unit for item in stimuli.items]
    folds = grouped_folds(units, N_FOLDS, seed)
    normalised = [a.normalised for a in acts]
    differences = [scenario_differences(rows, stimuli) for rows in normalised]
    order = {unit: i for i, unit in enumerate(stimuli.units)}
    place = np.array([order[unit] for unit in units])
    shares = np.bincount(place) / len(place)
    norms = [
        np.eye(len(shares))[place].T @ (rows**2).sum(-1) / np.bincount(place)[:, None] for rows in normalised
    ]
    # One memory order, so that sums over a saved and reloaded array round alike.
    kernels = np.ascontiguousarray(
        [strength_kernels(d, q, shares) for d, q in zip(differences, norms, strict=True)], np.float32
    )
    scores = np.stack([cross_fitted_scores(rows, labels, folds) for rows in normalised])
    rms = np.stack([a.rms for a in acts])
    return Measurement(
        concept=concept.name,
        role=concept.role,
        template=template,
        site=acts[0].component,
        layers=acts[0].layers,
        units=stimuli.units,
        kernels=kernels,
        items=tuple(item.id for item in stimuli.items),
        item_units=tuple(units),
        labels=labels,
        scores=scores,
        text_scores=text_scores,
        directions=np.stack([d.mean(0) for d in differences]) * rms[..., None],
        rms=rms,
        views=_views(
            normalised,
            differences,
            norms,
            shares,
            neutral_states(neutral, acts),
            labels,
            units,
            scores,
            seed,
            same_model,
            null_draws,
        ),
        same_model=same_model,
    )


def _views(
    normalised: Sequence[np.ndarray],
    differences: Sequence[np.ndarray],
    norms: Sequence[np.ndarray],
    shares: np.ndarray,
    neutral: Sequence[np.ndarray],
    labels: np.ndarray,
    units: Sequence[str],
    scores: np.ndarray,
    seed: int,
    same_model: bool,
    null_draws: int,
) -> Views:
    folds = grouped_folds(units, N_FOLDS, seed)
    carried = fit_map(*neutral)
    plain = transfer(normalised[0], normalised[1], labels, folds)
    cross = [
        cross_kernels(d, differences[1], norms[0], norms[1], shares)
        for d in (differences[0], carried.turn(differences[0]))
    ]
    mapped = plain
    if same_model:  # the map of a model to itself is the identity, but for rounding
        cross[1] = cross[0]
    else:
        mapped = transfer(normalised[0], normalised[1], labels, folds, carried)
    sides = [0, 0] if same_model else [0, 1]
    shuffled, random, whitened, losses = [], [], [], []
    for i in sorted(set(sides)):
        null = permutation_aurocs(normalised[i], labels, units, folds, null_draws, seed)
        shuffled.append(largest_p(auroc(scores[i], labels), null))
        observed, gaps = direction_gaps(differences[i], neutral[i], null_draws, seed)
        random.append((1 + (gaps >= observed).sum(0)) / (len(gaps) + 1))
        whitened.append(whitened_kernels(differences[i], neutral[i]))
        losses.append(cross_fitted_losses(normalised[i], labels, units, seed=seed))

    def both(values: list[np.ndarray]) -> np.ndarray:
        return np.ascontiguousarray([values[i] for i in sides], np.float32)

    whitening = whitening_covariance((differences[0], differences[sides[1]]), (neutral[0], neutral[sides[1]]))
    return Views(
        whitened=both(whitened),
        whitening=whitening,
        cross=np.ascontiguousarray(cross, np.float32),
        losses=both(losses),
        transfer=np.ascontiguousarray([plain, mapped]),
        map_error=np.zeros_like(carried.error) if same_model else carried.error,
        shuffled_p=both(shuffled),
        random_p=both(random),
        map_underdetermined=carried.underdetermined,
    )


def neutral_states(
    neutral: Sequence[Activations], acts: Sequence[Activations]
) -> list[Float[np.ndarray, "m layer d_model"]]:
    """Neutral texts of both models in units of the concept's rms.

    Its differences and the neutral texts' spread must share one unit, or d′ would carry the ratio of two rms that differs
    between the models.
    """
    return [x.normalised * (x.rms / a.rms)[:, None] for x, a in zip(neutral, acts, strict=True)]


def stimuli_labels(stimuli: StimulusSet) -> Int[np.ndarray, " item"]:
    """Labels of the texts as integers."""
    return np.array([int(item.label) for item in stimuli.items])


def scenario_differences(
    rows: Float[np.ndarray, "n layer d_model"], stimuli: StimulusSet
) -> Float[np.ndarray, "unit layer d_model"]:
    """D_s: mean over texts of label 1 minus mean over texts of label 0, averaged over a cluster's scenarios."""
    scenarios: dict[str, dict[float, list[int]]] = {}
    unit_of: dict[str, str] = {}
    for i, item in enumerate(stimuli.items):
        scenarios.setdefault(item.scenario, {0.0: [], 1.0: []})[float(item.label)].append(i)
        unit_of[item.scenario] = item.unit
    per_unit: dict[str, list[np.ndarray]] = {unit: [] for unit in stimuli.units}
    for scenario, rows_of in scenarios.items():
        per_unit[unit_of[scenario]].append(rows[rows_of[1.0]].mean(0) - rows[rows_of[0.0]].mean(0))
    return np.stack([np.mean(differences, axis=0) for differences in per_unit.values()])
