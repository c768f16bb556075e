"""Labels as numbers: the contrasts of a concept with two labels, with grades, or with categories.

A contrast gives every text a code: 0 or 1, its grade, or 1 in one category and 0 in the others. What a scenario shows of it is the
slope of the states on the code within the scenario, D_s = sum (y - mean y) h / sum (y - mean y)^2: for two labels that is the
difference of their means. Two labels and grades are one contrast, C categories are C; their kernels are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from empathy_probes.stimuli import LabelKind, StimulusSet


def categories(stimuli: StimulusSet) -> tuple[str, ...]:
    """The categories in alphabetical order; none where labels are numbers."""
    return tuple(sorted({str(item.label) for item in stimuli.items})) if stimuli.kind == "categorical" else ()


def label_numbers(stimuli: StimulusSet) -> Float[np.ndarray, " item"]:
    """Labels of the texts as numbers: themselves, or the place of their category."""
    place: dict[float | str, float] = {name: float(i) for i, name in enumerate(categories(stimuli))}
    return np.array([place.get(item.label, item.label) for item in stimuli.items], dtype=float)


def contrast_codes(kind: LabelKind, labels: Float[np.ndarray, " item"]) -> Float[np.ndarray, "contrast item"]:
    """Code of every text in every contrast, from `label_numbers`."""
    if kind == "categorical":
        return (labels == np.unique(labels)[:, None]).astype(float)
    return labels[None]


def coarse_numbers(
    names: Sequence[str], labels: Float[np.ndarray, " item"]
) -> Int[np.ndarray, " item"] | None:
    """Number of the coarse category of every text, where categories are named "coarse/fine"; None otherwise.

    None too where no coarse category holds two fine ones, or there is only one: nothing is fine within coarse then.
    """
    coarse = [name.partition("/")[0] for name in names if name.partition("/")[2]]
    known = sorted(set(coarse))
    if not names or len(coarse) < len(names) or not 1 < len(known) < len(names):
        return None
    return np.array([known.index(name) for name in coarse])[labels.astype(int)]


def scenario_contrasts(
    rows: Float[np.ndarray, "item layer d_model"], stimuli: StimulusSet
) -> Float[np.ndarray, "contrast unit layer d_model"]:
    """D_s of every contrast, averaged over a cluster's scenarios.

    Every scenario must show what the contrast compares (`design` refuses those that do not).
    """
    codes = contrast_codes(stimuli.kind, label_numbers(stimuli))
    scenarios: dict[str, list[int]] = {}
    for i, item in enumerate(stimuli.items):
        scenarios.setdefault(item.scenario, []).append(i)
    per_unit: dict[str, list[np.ndarray]] = {unit: [] for unit in stimuli.units}
    for texts in scenarios.values():
        spread = codes[:, texts] - codes[:, texts].mean(1, keepdims=True)
        weights = spread / (spread**2).sum(1, keepdims=True)
        slopes = np.tensordot(weights.astype(rows.dtype), rows[texts], 1)
        per_unit[stimuli.items[texts[0]].unit].append(slopes)
    return np.stack([np.mean(slopes, axis=0) for slopes in per_unit.values()], axis=1)
