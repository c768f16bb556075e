"""Mistakes made on purpose, and choices of the method taken out: what the scorecard looks like then.

Attacks on the analyst: shuffled labels, a keyword that gives the label away, a template frame that differs between the
models, texts missing in one model, correlated scenarios without `cluster`. Ablations: raw units instead of the rms, the
gap along a cross-fitted direction instead of U, isotropic instead of covariance-matched random directions. (Pointwise
instead of simultaneous bands is a metric of every cell, `pointwise_band`.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from empathy_probes.activations import Activations
from empathy_probes.auroc_intervals import auroc_interval
from empathy_probes.contrasts import compare
from empathy_probes.errors import InputError
from empathy_probes.grammar import stimuli_rows
from empathy_probes.measurements import measure_concept, unit_kernels
from empathy_probes.metrics import COVERAGE, FEWEST, Target, claims
from empathy_probes.nulls import direction_gaps
from empathy_probes.probes import N_FOLDS, lexical_scores
from empathy_probes.redraws import CURVES, Outcomes, Population, Sample, holds, redraw
from empathy_probes.scorecard import MADE_UP, TEXTS_ALONE, Row, mean_row, proportion_row
from empathy_probes.secondary import Exhibit
from empathy_probes.stats import critical_t, grouped_folds
from empathy_probes.stimuli import StimulusSet

CLUSTER = 5
# Redraws of one shuffle of the population's labels.
PER_SHUFFLE = 10


# ---------------------------------------------------------------- attacks


def shuffled_labels(population: Population, n: int, redraws: int, seed: int) -> Float[np.ndarray, " redraw"]:
    """Whether anything is decided where each scenario's labels are swapped or not by chance, alike in both models."""
    found = []
    for first in range(0, redraws, PER_SHUFFLE):
        rng = np.random.default_rng([seed, 21, first])
        samples = []
        for sample in population.samples:
            sign = rng.choice([-1.0, 1.0], sample.n)[None, :, None, None].astype(sample.differences.dtype)
            swapped = sample.differences * sign if sample.role == "target" else sample.differences
            samples.append(replace(sample, differences=swapped))
        shuffled = replace(population, samples=tuple(samples))
        found.append(_decisions(redraw(shuffled, n, min(PER_SHUFFLE, redraws - first), seed + first)))
    return np.concatenate(found)


def keyword_leak(n: int, draws: int, seed: int, *, leaked: bool = True) -> Float[np.ndarray, " draw"]:
    """Whether the lexical floor reads a word that gives the label away, per draw of texts that say nothing else of it."""
    caught = []
    for draw in range(draws):
        rows = stimuli_rows("tense", n, seed + draw, doubt=1.0)
        texts = [f"Well , {row['text']}" if leaked and row["label"] else row["text"] for row in rows]
        labels, units = np.array([int(row["label"]) for row in rows]), [row["scenario"] for row in rows]
        floor = auroc_interval(lexical_scores(texts, labels[None], units, draw), labels, units)
        caught.append(float(floor.lower[0] > 0.9))
    return np.array(caught)


def missing_texts(
    exhibit: Exhibit, n: int, draws: int, seed: int, *, missing: bool = True
) -> Float[np.ndarray, " draw"]:
    """Whether a study of n scenarios is refused for texts that either model has not read; without `missing`, both have read all."""
    stimuli = exhibit.concept.stimuli
    caught = []
    for draw in range(draws):
        rng = np.random.default_rng([seed, 61, draw])
        chosen = {stimuli.units[i] for i in rng.choice(exhibit.n, n, replace=False)}
        rows = [i for i, item in enumerate(stimuli.items) if item.unit in chosen]
        concept = replace(exhibit.concept, stimuli=stimuli.of_units(chosen))
        acts = [replace(a, acts=a.acts[rows]) for a in exhibit.acts]
        if missing:
            model, lost = draw % 2, int(rng.integers(1, 10))
            kept = np.sort(rng.choice(len(rows), len(rows) - lost, replace=False))
            acts[model] = replace(acts[model], acts=acts[model].acts[kept])
        try:
            measure_concept(
                concept, "raw", acts, exhibit.neutral, np.zeros((1, len(rows))), draw, False, null_draws=1
            )
            caught.append(0.0)
        except InputError as error:
            caught.append(float("has read" in str(error)))
    return np.array(caught)


def told_often(
    exhibit: Exhibit, n: int, redraws: int, seed: int, *, clustered: bool
) -> Float[np.ndarray, " redraw"]:
    """Whether the interval of attenuation holds the truth when each of `n` scenarios is told five times over, with `cluster` or without."""
    stimuli = exhibit.concept.stimuli
    rows_of: dict[str, list[int]] = {}
    for i, item in enumerate(stimuli.items):
        rows_of.setdefault(item.scenario, []).append(i)
    names = list(rows_of)
    truth = _attenuation(stimuli, exhibit.acts)[0]
    found = []
    for r in range(redraws):
        chosen = np.random.default_rng([seed, 31, r]).choice(len(names), n, replace=False)
        rows = [(row, k) for i in chosen for k in range(CLUSTER) for row in rows_of[names[i]]]
        items = [
            replace(item, id=f"{item.id}-{k}", scenario=f"{item.scenario}-{k}", cluster=item.scenario if clustered else "")
            for item, k in ((stimuli.items[row], k) for row, k in rows)
        ]  # fmt: skip
        acts = [replace(a, acts=a.acts[[row for row, _ in rows]]) for a in exhibit.acts]
        found.append(_attenuation(replace(stimuli, items=tuple(items)), acts))
    return _held(truth, np.stack(found), n / exhibit.n)


def _attenuation(
    stimuli: StimulusSet, acts: Sequence[Activations]
) -> Float[np.ndarray, "value_lower_upper=3"]:
    """What a study says of the attenuation at the only layer there is."""
    curve = compare("told", stimuli.units, unit_kernels(stimuli, acts), (0,)).attenuation
    return np.array([curve.value[0], curve.lower[0], curve.upper[0]])


def _held(
    truth: float, intervals: Float[np.ndarray, "redraw 3"], drawn: float
) -> Float[np.ndarray, " redraw"]:
    """Which intervals of attenuation hold the truth, of samples that are this part of the population."""
    return holds(np.asarray(truth), intervals, drawn, np.asarray(False), np.asarray(True)).astype(float)


# ---------------------------------------------------------------- ablations


def in_raw_units(population: Population) -> Population:
    """The same without division by the rms."""
    return replace(
        population, samples=tuple(replace(s, squares=np.ones_like(s.squares)) for s in population.samples)
    )


def gap_attenuation(sample: Sample, rows: np.ndarray, layer: int, seed: int) -> tuple[float, float, float]:
    """1 - gap(aligned)/gap(base) along cross-fitted difference-of-means directions, with a delta-method interval."""
    n = len(rows)
    folds = grouped_folds([str(i) for i in range(n)], N_FOLDS, seed)
    gaps = np.empty((2, n))
    for model in (0, 1):
        d = sample.differences[model, rows, layer].astype(float) / np.sqrt(
            sample.squares[model, rows, layer].mean()
        )
        for fold in range(N_FOLDS):
            w = d[folds != fold].mean(0)
            gaps[model, folds == fold] = d[folds == fold] @ w / np.linalg.norm(w)
    base, aligned = gaps.mean(1)
    residual = (gaps[1] - aligned / base * gaps[0]) / base
    reach = float(critical_t(n - 1)) * residual.std(ddof=1) / np.sqrt(n)
    value = 1 - aligned / base
    return value, value - reach, value + reach


def dominant_direction(isotropic: bool, draws: int, seed: int) -> Float[np.ndarray, " draw"]:
    """Whether a contrast that merely lies along the axis of largest variance is called more than chance (p < .05)."""
    called = []
    for draw in range(draws):
        rng = np.random.default_rng([seed, 41, draw])
        x = rng.standard_normal((400, 1, 300)) * np.array([12.0, *np.ones(299)])
        d = rng.standard_normal((60, 1, 300)) * 0.3
        d[..., 0] += 3 + 6 * rng.standard_normal((60, 1))
        units = [str(i) for i in range(60)]
        observed, null = direction_gaps(d, x, units, draws=499, seed=draw, isotropic=isotropic)
        called.append(float((1 + (null[:, 0] >= observed[0]).sum()) / 500 < 0.05))
    return np.array(called)


# ---------------------------------------------------------------- rows


def attack_rows(
    planted: Population,
    framed: Population,
    scaled: Population,
    shown: Exhibit,
    architecture: str,
    concept: str,
    layer: int,
    n: int,
    redraws: int,
    seed: int,
) -> tuple[Row, ...]:
    """Attacks and ablations on one base.

    Args:
        planted: a twin in which `concept` was planted at `layer`.
        framed: equal weights, the aligned model's texts in another frame.
        scaled: a rescaled twin.
        shown: the planted twin's states of `concept`.
        architecture: of the base.
        concept: what was planted.
        layer: where.
        n: scenarios.
        redraws: per row.
        seed: of everything drawn.
    """
    rare, often = Target(most=0.05, consistent=True), Target(0.95)

    told = 2 * n // CLUSTER

    def row(
        name: str, metric: str, values: np.ndarray, target: Target | None = None, of: str = "", n: int = n
    ) -> Row:
        return proportion_row(name, architecture, of, n, metric, values, target)

    sample = next(s for s in planted.samples if s.concept == concept)
    few = min(redraws, FEWEST)
    without, within = (told_often(shown, told, redraws, seed, clustered=c) for c in (False, True))
    return (
        row("attack: shuffled labels", "false_alarm", shuffled_labels(planted, n, redraws, seed), rare),
        row("attack: another template frame", "false_alarm", _decisions(redraw(framed, n, redraws, seed)), rare),
        row("attack: texts missing in one model", "caught", missing_texts(shown, n, few, seed), often),
        row("attack: no texts missing", "caught", missing_texts(shown, n, few, seed, missing=False), rare),
        row("attack: scenarios told five times, no cluster", "coverage_attenuation", without, None, concept, told),
        row("attack: scenarios told five times, cluster given", "coverage_attenuation", within, COVERAGE, concept, told),
        *_ablations(planted, scaled, sample, architecture, layer, n, redraws, seed),
    )  # fmt: skip


def _decisions(outcomes: Outcomes) -> Float[np.ndarray, " redraw"]:
    return claims(outcomes).any((1, 2)).astype(float)


def _ablations(
    planted: Population,
    scaled: Population,
    sample: Sample,
    architecture: str,
    layer: int,
    n: int,
    redraws: int,
    seed: int,
) -> tuple[Row, ...]:
    k, at = CURVES.index("attenuation"), planted.layers.index(layer)
    # `specific` forgives a change of units, because controls share it: the size of the attenuation itself does not.
    raw = redraw(in_raw_units(scaled), n, redraws, seed).curves[:, 0, at, k, 0]
    targets = [s.concept for s in planted.of_role("target")]
    truth = planted.truth[targets.index(sample.concept), at, k]
    drawn = [np.random.default_rng([seed, 51, r]).choice(sample.n, n, replace=False) for r in range(redraws)]
    found = np.array([gap_attenuation(sample, rows, at, r) for r, rows in enumerate(drawn)])
    held = _held(truth, found, n / sample.n)
    gap = ("ablation: cross-fitted gap", architecture, sample.concept, n)
    return (
        mean_row("ablation: raw units, rescaled twin", architecture, "", n, "bias", raw),
        mean_row(*gap, "bias", found[:, 0] - truth),
        proportion_row(*gap, "coverage_attenuation", held),
    )


def keyword_rows(n: int, redraws: int, seed: int) -> tuple[Row, ...]:
    """A keyword that gives the label away, and the same texts without it: of texts alone, whatever the bases."""
    draws = min(redraws, FEWEST)
    leaked, clean = (keyword_leak(n, draws, seed, leaked=leaked) for leaked in (True, False))
    said = (TEXTS_ALONE, "", n, "caught")
    return (
        proportion_row("attack: keyword leak", *said, leaked, Target(0.95)),
        proportion_row("attack: keyword leak, without the keyword", *said, clean, Target(most=0.05, consistent=True)),
    )  # fmt: skip


def null_rows(draws: int, seed: int) -> tuple[Row, ...]:
    """Isotropic instead of covariance-matched random directions; on made-up states, because a phantom's vary about evenly."""
    name, said = "ablation: {} random directions", (MADE_UP, "", 60, "false_alarm")
    isotropic, matched = (dominant_direction(i, draws, seed) for i in (True, False))
    return (
        proportion_row(name.format("isotropic"), *said, isotropic),
        proportion_row(name.format("covariance-matched"), *said, matched, Target(most=0.05, consistent=True)),
    )
