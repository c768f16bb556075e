"""One concept in both models, under one template at one site: everything its numbers are computed from.

Per scenario the two labels' activations are subtracted (`coding` says what stands for that with grades and categories); the
Gram matrix of these differences, in units of each model's own rms, is all that strength needs (section 2 of the method). Beside it stand other views of the same activations:
crossnobis kernels, cross-model kernels, out-of-fold probe scores within and across models, nested log-losses, and what
shuffled labels and random directions give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from empathy_probes.activations import Activations
from empathy_probes.alignment import NeutralMap, fit_map
from empathy_probes.auroc import auroc, correlation, smooth_auroc
from empathy_probes.auroc_intervals import (
    area_attenuation,
    area_difference,
    area_interval,
    fisher_interval,
    paired_difference,
)
from empathy_probes.bits import cross_fitted_grade_losses, cross_fitted_losses
from empathy_probes.coding import (
    categories,
    coarse_numbers,
    contrast_codes,
    label_numbers,
    scenario_contrasts,
)
from empathy_probes.concepts import Concept
from empathy_probes.contrasts import Contrast, compare
from empathy_probes.errors import InputError
from empathy_probes.geometry import map_variance, transfer, whitened_kernels, whitening_covariance
from empathy_probes.jackknife import Jackknife, leave_one_out, leave_one_out_correlations, pair_variance
from empathy_probes.kernels import cross_kernels, strength_kernels
from empathy_probes.leaving_out import leave_out
from empathy_probes.nulls import DRAWS, direction_gaps, largest_p, permutation_null
from empathy_probes.probes import AREA_FACTOR, N_FOLDS, is_binary
from empathy_probes.stats import Curve, grouped_folds
from empathy_probes.stimuli import LabelKind, StimulusSet

TRANSFER_LOSS = 0.1
"""AUROC (grades: correlation) by which a probe of the other model must surely fall short to have failed."""
BASE, ALIGNED = 0, 1
# What a probe reads: its own model's states, the other's as they are, the other's carried over by the neutral-text map.
OWN, PLAIN, MAPPED = 0, 1, 2


@dataclass(frozen=True)
class Views:
    """The same concept seen otherwise; float32 like the kernels of strength."""

    whitened: Float[np.ndarray, "model=2 layer n n"]
    """D W Dᵀ, W the inverse covariance of neutral texts in each model: its strength is crossnobis d′."""
    whitening: Float[np.ndarray, "model=2 model=2 layer"]
    """Covariance of the two U of `whitened` that comes from the choice of neutral texts."""
    cross: Float[np.ndarray, "mapped=2 layer n n"]
    """<D_base,s, D_aligned,t>: as the states are, and with the base's carried over by the neutral-text map."""
    mapping: Float[np.ndarray, " layer"]
    """Variance of the U of the mapped `cross` that comes from the choice of neutral texts."""
    losses: Float[np.ndarray, "model=2 what=4 layer unit"]
    """Per scenario log-loss in bits of a nested probe, its influence, that of pairs, and the mean loss had it another label (`bits.cross_fitted_losses`)."""
    fine_losses: Float[np.ndarray, "model=2 what=4 layer fine_unit"]
    """The same of the category, told the coarse one it lies in; no scenarios where no category lies in another."""
    transfer: Float[np.ndarray, "mapped=2 fitted=2 layer contrast item"]
    """Out-of-fold scores of each model's probe on the other's states, plain and mapped."""
    left_out: Float[np.ndarray, "fitted=2 read=3 layer unit"]
    """`smooth_reading` of each model's probe on its own states, the other's, and those mapped, without each scenario in turn,
    probes trained anew: from these the errors of readings and of their differences are computed."""
    pairs: Float[np.ndarray, "fitted=2 read=3 layer unit"]
    """What pairs of scenarios do to it together (`jackknife.Jackknife`)."""
    map_error: Float[np.ndarray, " layer"]
    """Share of neutral variance that the map misses on texts it was not fitted on."""
    shuffled_p: Float[np.ndarray, "model=2 layer"]
    """Of each model's AUROC (grades: correlation) among shuffled labels, the largest over layers of each shuffle."""
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
    item_scenarios: tuple[str, ...]
    labels: Float[np.ndarray, " item"]
    """0 and 1, grades, or places in `categories`."""
    scores: Float[np.ndarray, "model=2 layer contrast item"]
    """Out-of-fold probe scores of every text."""
    text_scores: Float[np.ndarray, "contrast item"]
    """Out-of-fold scores of the bag of words."""

    directions: Float[np.ndarray, "model=2 contrast layer d_model"]
    """Difference of means, label 1 minus label 0 (per grade; one category minus the others), in raw activation units."""
    rms: Float[np.ndarray, "model=2 layer"]
    """Root mean square norm of each model's pooled activations: the unit of strength."""

    views: Views
    same_model: bool = False
    """Both models have equal weights."""
    kind: str = "binary"
    """binary, graded or categorical."""
    categories: tuple[str, ...] = ()

    @cached_property
    def codes(self) -> Num[np.ndarray, "contrast item"]:
        """0 and 1 per contrast, or the grades."""
        codes = contrast_codes(cast(LabelKind, self.kind), self.labels)
        return codes if self.kind == "graded" else codes.astype(int)

    @property
    def measure(self) -> str:
        """Name of how well probes read the concept: auroc (categories: its mean) or correlation."""
        return "correlation" if self.kind == "graded" else "auroc"

    def reading(self, fitted: int, read: int = OWN) -> Curve:
        """How well the probe of one model (`BASE`, `ALIGNED`) tells the labels, with a 95 % interval.

        AUROC, its mean over categories, or the correlation with grades, of out-of-fold scores of `OWN` states, or of the other
        model's, `PLAIN` or `MAPPED`. All probes are trained anew without each scenario: what they read depends on those they
        learnt from, of which the texts they read know nothing.
        """
        return self._interval(self._jackknife(fitted, read))

    def reading_difference(self, first: tuple[int, int], second: tuple[int, int]) -> Curve:
        """Second reading minus the first, each given by the model whose probe it is and what that reads."""
        one, other = self._jackknife(*first), self._jackknife(*second)
        if self.kind == "graded":
            return paired_difference(one, other)
        own = first[1] == second[1] == OWN  # the same whichever is taken from the other
        scores = self._scores_of(*first), self._scores_of(*second)
        return area_difference(one, other, *(self._own_pairwise if own else self._pairwise(*scores)))

    def reading_attenuation(self) -> tuple[Curve, Bool[np.ndarray, " layer"]]:
        """What d' of the two models' own AUROC has lost, and where both are at the ceiling; not for grades."""
        base, aligned = (self._jackknife(fitted, OWN) for fitted in (BASE, ALIGNED))
        return area_attenuation(base, aligned, *self._own_pairwise)

    @cached_property
    def _own_pairwise(self) -> tuple[Bool[np.ndarray, " layer"], Float[np.ndarray, " layer"]]:
        return self._pairwise(*self.scores)

    def _pairwise(
        self,
        one: Float[np.ndarray, "layer contrast item"],
        other: Float[np.ndarray, "layer contrast item"],
        *,
        beyond_ramps: bool = True,
    ) -> tuple[Bool[np.ndarray, " layer"], Float[np.ndarray, " layer"]]:
        """Where two probes score all texts alike, and what single pairs of scenarios tell of the difference of their AUROC."""
        same = np.asarray((one == other).all((-2, -1)))
        return same, pair_variance(one, other, self.codes, self.item_units, beyond_ramps=beyond_ramps)

    def _scores_of(self, fitted: int, read: int) -> Float[np.ndarray, "layer contrast item"]:
        return self.scores[fitted] if read == OWN else self.views.transfer[read - PLAIN, fitted]

    def _jackknife(self, fitted: int, read: int) -> Jackknife:
        left_out, pairs = (
            x[fitted, read].astype(np.float64) for x in (self.views.left_out, self.views.pairs)
        )
        return Jackknife(_reading(self._scores_of(fitted, read), self.codes), left_out, pairs)

    def _interval(self, found: Jackknife, widen: float = 1.0) -> Curve:
        return fisher_interval(found, widen) if self.kind == "graded" else area_interval(found, widen)

    def _leave_one_out(self, scores: Float[np.ndarray, "layer contrast item"]) -> Jackknife:
        if self.kind == "graded":
            return leave_one_out_correlations(scores[..., 0, :], self.labels, self.item_units)
        return leave_one_out(scores, self.codes, self.item_units)

    @cached_property
    def lexical(self) -> Curve:
        """How well the bag of words tells the labels, at the one place there is."""
        return self._interval(self._leave_one_out(self.text_scores[None]), AREA_FACTOR)

    def transfer_fails(self, *, mapped: bool) -> Bool[np.ndarray, " layer"]:
        """Where the base's probe surely reads the aligned model worse than the aligned model's own probe does."""
        difference = self.reading_difference((ALIGNED, OWN), (BASE, MAPPED if mapped else PLAIN))
        return np.asarray(difference.upper < -TRANSFER_LOSS)

    @property
    def key(self) -> str:
        """Names the measurement, also in saved files."""
        return f"{self.concept}/{self.template}/{self.site}"

    @cached_property
    def contrast(self) -> Contrast:
        """Strength in both models and what became of it."""
        return compare(
            self.concept, self.units, self.kernels.astype(np.float64), self.layers, same_model=self.same_model
        )

    @cached_property
    def separation(self) -> Contrast:
        """The same comparison of crossnobis d′."""
        kernels = self.views.whitened.astype(np.float64)
        return compare(
            self.concept,
            self.units,
            kernels,
            self.layers,
            same_model=self.same_model,
            extra=self.views.whitening,
        )

    @cached_property
    def beats_words(self) -> Bool[np.ndarray, " layer"]:
        """Layers at which the base's probe exceeds the bag of words beyond chance."""
        words = np.broadcast_to(self.text_scores, self.scores[0].shape)
        one, other = (self._leave_one_out(scores) for scores in (words, self.scores[0]))
        if self.kind == "graded":
            return np.asarray(paired_difference(one, other, AREA_FACTOR).lower > 0)
        pairwise = self._pairwise(words, self.scores[0], beyond_ramps=False)
        return np.asarray(area_difference(one, other, *pairwise, AREA_FACTOR).lower > 0)


def measure_concept(
    concept: Concept,
    template: str,
    acts: Sequence[Activations],
    neutral: Sequence[Activations],
    text_scores: Float[np.ndarray, "contrast item"],
    seed: int,
    same_model: bool,
    null_draws: int = DRAWS,
    carried: NeutralMap | None = None,
) -> Measurement:
    """Reduce a concept's activations in both models, and those of the neutral texts, to a measurement.

    Args:
        concept: of any kind of label; every scenario shows every category.
        template: what the prompts were rendered with.
        acts: of the base and of the aligned model.
        neutral: the same of neutral texts.
        text_scores: out-of-fold scores of the bag of words.
        seed: of folds and draws.
        same_model: both models have equal weights.
        null_draws: shuffles and random directions.
        carried: the map that the neutral texts give in units of their own rms, where it is known already.
    """
    stimuli = concept.stimuli
    for side, own in zip(("base", "aligned"), acts, strict=True):
        if len(own.acts) != len(stimuli.items):
            raise InputError(
                f"the {side} model has read {len(own.acts)} of the {len(stimuli.items)} texts of '{concept.name}', expected all of "
                "them; extract the same texts in both models"
            )
    labels, units = label_numbers(stimuli), [item.unit for item in stimuli.items]
    codes = contrast_codes(stimuli.kind, labels)
    folds = grouped_folds(units, N_FOLDS, seed)
    normalised = [a.normalised for a in acts]
    differences = [scenario_contrasts(rows, stimuli) for rows in normalised]
    shares = unit_shares(stimuli)
    norms = [unit_norms(rows, stimuli) for rows in normalised]
    # One memory order, so that sums over a saved and reloaded array round alike.
    kernels = np.ascontiguousarray(_kernels(differences, norms, shares), np.float32)
    # Equal weights may still have read other texts: each in its own chat template. Only equal states are read once.
    same_model = same_model and np.array_equal(acts[0].acts, acts[1].acts)
    sides = [0, 0] if same_model else [0, 1]
    scenarios = [item.scenario for item in stimuli.items]
    read = [
        permutation_null(normalised[i], codes, units, scenarios, folds, null_draws, seed)
        for i in sorted(set(sides))
    ]
    scores = np.stack([read[i][0] for i in sides])
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
        item_scenarios=tuple(scenarios),
        labels=labels,
        scores=scores,
        text_scores=text_scores,
        directions=np.stack([d.mean(1) for d in differences]) * rms[:, None, :, None],
        rms=rms,
        views=_views(
            normalised,
            differences,
            norms,
            shares,
            neutral_states(neutral, acts),
            (carried or fit_map(*(x.normalised for x in neutral))).rescaled(
                np.stack([x.rms / a.rms for x, a in zip(neutral, acts, strict=True)])
            ),
            stimuli,
            [largest_p(_reading(own, codes), null) for own, null in read],
            seed,
            same_model,
            null_draws,
        ),
        same_model=same_model,
        kind=stimuli.kind,
        categories=categories(stimuli),
    )


def unit_kernels(
    stimuli: StimulusSet, acts: Sequence[Activations]
) -> Float[np.ndarray, "model layer unit unit"]:
    """Kernels of strength of each model, and nothing else of a measurement."""
    normalised = [a.normalised for a in acts]
    return _kernels(
        [scenario_contrasts(rows, stimuli) for rows in normalised],
        [unit_norms(rows, stimuli) for rows in normalised],
        unit_shares(stimuli),
    )


def _kernels(
    differences: Sequence[np.ndarray], norms: Sequence[np.ndarray], shares: np.ndarray
) -> Float[np.ndarray, "model layer unit unit"]:
    kernels = [
        np.mean([strength_kernels(contrast, q, shares) for contrast in d], axis=0)
        for d, q in zip(differences, norms, strict=True)
    ]
    return np.stack(kernels)


def _places(stimuli: StimulusSet) -> Int[np.ndarray, " item"]:
    order = {unit: i for i, unit in enumerate(stimuli.units)}
    return np.array([order[item.unit] for item in stimuli.items])


def unit_shares(stimuli: StimulusSet) -> Float[np.ndarray, " unit"]:
    """Of all texts, the share that is each unit's."""
    place = _places(stimuli)
    return np.bincount(place) / len(place)


def unit_norms(
    rows: Float[np.ndarray, "item layer d_model"], stimuli: StimulusSet
) -> Float[np.ndarray, "unit layer"]:
    """Mean squared norm of each unit's texts."""
    place = _places(stimuli)
    counts = np.bincount(place)
    return np.eye(len(counts))[place].T @ (rows**2).sum(-1) / counts[:, None]


def _views(
    normalised: Sequence[np.ndarray],
    differences: Sequence[np.ndarray],
    norms: Sequence[np.ndarray],
    shares: np.ndarray,
    neutral: Sequence[np.ndarray],
    carried: NeutralMap,
    stimuli: StimulusSet,
    shuffled_p: list[np.ndarray],
    seed: int,
    same_model: bool,
    null_draws: int,
) -> Views:
    labels, units = label_numbers(stimuli), [item.unit for item in stimuli.items]
    codes = contrast_codes(stimuli.kind, labels)
    coarse = coarse_numbers(categories(stimuli), labels)
    folds = grouped_folds(units, N_FOLDS, seed)
    plain = transfer(normalised[0], normalised[1], codes, folds)
    turned = [differences[0], np.stack([carried.turn(contrast) for contrast in differences[0]])]
    cross = [
        np.mean(
            [cross_kernels(b, a, norms[0], norms[1], shares) for b, a in zip(d, differences[1], strict=True)],
            axis=0,
        )
        for d in turned
    ]
    mapped = plain
    if same_model:  # the map of a model to itself is the identity, but for rounding
        cross[1] = cross[0]
    else:
        mapped = transfer(normalised[0], normalised[1], codes, folds, carried)
    sides = [0, 0] if same_model else [0, 1]
    random, whitened, losses, fine_losses = [], [], [], []
    for i in sorted(set(sides)):
        gaps = [
            direction_gaps(d, neutral[i], stimuli.units, null_draws, seed, contrast=c)
            for c, d in enumerate(differences[i])
        ]
        observed, drawn = (np.mean(values, axis=0) for values in zip(*gaps, strict=True))
        random.append((1 + (drawn >= observed).sum(0)) / (len(drawn) + 1))
        whitened.append(np.mean([whitened_kernels(d, neutral[i]) for d in differences[i]], axis=0))
        states = normalised[i]
        if stimuli.kind == "graded":
            losses.append(cross_fitted_grade_losses(states, labels, units, seed=seed))
        else:
            losses.append(cross_fitted_losses(states, labels.astype(int), units, seed=seed))
        fine_losses.append(
            np.zeros((*losses[-1].shape[:2], 0))
            if coarse is None
            else cross_fitted_losses(states, labels.astype(int), units, given=coarse, seed=seed)
        )

    def both(values: list[np.ndarray]) -> np.ndarray:
        return np.ascontiguousarray([values[i] for i in sides], np.float32)

    left_out, pairs = _left_out(normalised, codes, folds, units, carried, seed, same_model)
    whitening = whitening_covariance((differences[0], differences[sides[1]]), (neutral[0], neutral[sides[1]]))
    return Views(
        whitened=both(whitened),
        whitening=whitening,
        cross=np.ascontiguousarray(cross, np.float32),
        mapping=np.zeros(len(cross[0]))
        if same_model
        else map_variance((differences[0], differences[1]), (neutral[0], neutral[1])),
        losses=both(losses),
        fine_losses=both(fine_losses),
        transfer=np.ascontiguousarray([plain, mapped]),
        left_out=np.ascontiguousarray(left_out, np.float32),
        pairs=np.ascontiguousarray(pairs, np.float32),
        map_error=np.zeros_like(carried.error) if same_model else carried.error,
        shuffled_p=both(shuffled_p),
        random_p=both(random),
        map_underdetermined=carried.underdetermined,
    )


def _left_out(
    normalised: Sequence[np.ndarray],
    codes: np.ndarray,
    folds: np.ndarray,
    units: Sequence[str],
    carried: NeutralMap,
    seed: int,
    same_model: bool,
) -> list[Float[np.ndarray, "fitted=2 read=3 layer unit"]]:
    base, aligned = normalised
    sides = [(base, [base])] if same_model else [
        (base, [base, aligned, carried.backward(aligned)]), (aligned, [aligned, base, carried.forward(base)])
    ]  # fmt: skip
    found = [leave_out(fitted, reads, codes, folds, units, smooth_reading, seed) for fitted, reads in sides]
    both = [np.stack(part) for part in zip(*((x.left_out, x.pairs) for x in found), strict=True)]
    return [np.broadcast_to(x, (2, 3, *x.shape[2:])) for x in both]


def smooth_reading(
    scores: Float[np.ndarray, "*batch contrast n"],
    codes: Num[np.ndarray, "contrast n"],
    kept: Float[np.ndarray, "*#batch n"],
) -> Float[np.ndarray, "*batch"]:
    """What is left out of to tell how far a reading errs: `smooth_auroc` of the texts `kept`, or their correlation with grades."""
    if is_binary(codes):
        return smooth_auroc(scores, codes.astype(int), kept)
    return correlation(scores[..., 0, :], codes[0], kept)


def _reading(scores: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return auroc(scores, codes.astype(int)) if is_binary(codes) else correlation(scores[..., 0, :], codes[0])


def neutral_states(
    neutral: Sequence[Activations], acts: Sequence[Activations]
) -> list[Float[np.ndarray, "m layer d_model"]]:
    """Neutral texts of both models in units of the concept's rms.

    Its differences and the neutral texts' spread must share one unit, or d′ would carry the ratio of two rms that differs
    between the models.
    """
    return [x.normalised * (x.rms / a.rms)[:, None] for x, a in zip(neutral, acts, strict=True)]
