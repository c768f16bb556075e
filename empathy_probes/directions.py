"""Where a concept points: estimators of one direction per layer from states at the read position.

All are signed by the label (from 0 to 1) and as long as the labels lie apart along them, so that only their direction differs. A direction
that is used on the texts it was fitted on flatters itself; the cross-fitted ones of a scenario owe nothing to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from empathy_probes.activations import Activations
from empathy_probes.coding import contrast_codes, label_numbers, scenario_contrasts
from empathy_probes.concepts import Concept
from empathy_probes.errors import InputError
from empathy_probes.extraction import check_prompts, extract
from empathy_probes.kernels import mean_product
from empathy_probes.models import Model
from empathy_probes.prompts import render, style_of
from empathy_probes.stimuli import StimulusSet
from empathy_probes.store import open_store
from empathy_probes.vectors import SteeringVector, check_not_zero, make_vector

Estimator = Callable[
    [Float[np.ndarray, "item layer d_model"], StimulusSet], Float[np.ndarray, "layer d_model"]
]
"""From states and their labels to one direction per layer, in the states' units, from label 0 to label 1."""
N_FOLDS = 5


def difference_of_means(
    rows: Float[np.ndarray, "item layer d_model"], stimuli: StimulusSet
) -> Float[np.ndarray, "layer d_model"]:
    """Mean over scenarios of label 1 minus label 0 (per grade)."""
    return np.asarray(scenario_contrasts(rows, stimuli)[0].mean(0))


def pca_of_differences(
    rows: Float[np.ndarray, "item layer d_model"], stimuli: StimulusSet
) -> Float[np.ndarray, "layer d_model"]:
    """First principal direction of the scenarios' differences, about 0 and not about their mean, which is the concept itself.

    Signed by the label and as long as the mean difference along it.
    """
    each = scenario_contrasts(rows, stimuli)[0]
    first = [np.linalg.svd(each[:, i], full_matrices=False)[2][0] for i in range(each.shape[1])]
    return _as_long_as_the_gap(np.stack(first), each.mean(0))


def probe_weights(
    rows: Float[np.ndarray, "item layer d_model"], stimuli: StimulusSet
) -> Float[np.ndarray, "layer d_model"]:
    """Weights of the ridge probe of `probes`: they read the concept apart from what else varies.

    Signed by the label and as long as the mean difference along them.
    """
    labels = contrast_codes(stimuli.kind, label_numbers(stimuli))[0]
    weights = []
    for i in range(rows.shape[1]):
        x = rows[:, i] - rows[:, i].mean(0)
        gram = x @ x.T
        penalty = np.trace(gram) / len(x)
        ridge = np.where(penalty > 0, penalty, 1.0) * np.eye(len(x))
        weights.append(x.T @ np.linalg.solve(gram + ridge, labels - labels.mean()))
    return _as_long_as_the_gap(np.stack(weights), scenario_contrasts(rows, stimuli)[0].mean(0))


def scenario_differences(acts: Activations, stimuli: StimulusSet) -> Float[np.ndarray, "unit layer d_model"]:
    """D_s of the concept's (first) contrast, in units of the rms."""
    return np.asarray(scenario_contrasts(acts.normalised, stimuli)[0])


def unit_rows(rows: Float[np.ndarray, "*batch d_model"]) -> Float[np.ndarray, "*batch d_model"]:
    """Rows of length 1; a zero row stays zero."""
    size = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(np.divide(rows, size, out=np.zeros_like(rows), where=size > 0))


def cross_fitted_directions(
    differences: Float[np.ndarray, "unit layer d_model"], folds: Int[np.ndarray, " unit"]
) -> Float[np.ndarray, "fold layer d_model"]:
    """Unit direction of the other folds' mean difference, for every fold.

    Raises:
        InputError: the texts' states do not differ at a layer.
    """
    found = unit_rows(np.stack([differences[folds != f].mean(0) for f in range(int(folds.max()) + 1)]))
    if not found.any(-1).all():
        raise InputError(
            "there is no direction at one of the layers: the texts' states at the read position do not differ there, expected them "
            "to; choose later layers"
        )
    return found


def direction_cosine(
    differences: Float[np.ndarray, "unit layer d_model"], folds: Int[np.ndarray, " unit"]
) -> Float[np.ndarray, " layer"]:
    """Estimated cosine of the cross-fitted directions with the mean difference of all scenarios there could be.

    sqrt(U / mean ‖D̄‖²): U, the mean of <D_s, D_t> over different scenarios, has no noise in it, the squared length of a
    fold's mean has. What is measured along a direction is smaller by about this factor than along the true one; 0 where U is negative.
    """
    rows = np.moveaxis(differences, 0, -2)
    u = mean_product(rows, rows)
    fitted = [(differences[folds != f].mean(0) ** 2).sum(-1) for f in range(int(folds.max()) + 1)]
    return np.sqrt(np.clip(u, 0, None) / np.maximum(np.mean(fitted, axis=0), 1e-300)).clip(max=1.0)


ESTIMATORS: dict[str, Estimator] = {
    "difference_of_means": difference_of_means,
    "pca_of_differences": pca_of_differences,
    "probe_weights": probe_weights,
}


def _as_long_as_the_gap(
    rows: Float[np.ndarray, "layer d_model"], gap: Float[np.ndarray, "layer d_model"]
) -> Float[np.ndarray, "layer d_model"]:
    squares = (rows**2).sum(-1, keepdims=True)
    along = (rows * gap).sum(-1, keepdims=True)
    return np.asarray(rows * np.divide(along, squares, out=np.zeros_like(along), where=squares > 0))


def fit_vector(
    model: Model,
    concept: Concept,
    layers: Sequence[int] | None = None,
    *,
    site: str = "resid_post",
    template: str = "raw",
    estimator: Estimator = difference_of_means,
    store: str | None = None,
) -> SteeringVector:
    """Fit a concept's direction in one model from states at its read position.

    Args:
        model: reads the texts.
        concept: of two labels or grades.
        layers: 0-based blocks; all by default.
        site: TransformerLens name.
        template: raw, or chat: the model's own template.
        estimator: one of `ESTIMATORS`, or a function of one's own.
        store: activation store; the default one if None.

    Raises:
        InputError: the concept has categories, or its direction is zero at a layer.
    """
    if concept.stimuli.kind == "categorical":
        raise InputError(
            f"concept '{concept.name}' has categories, expected two labels or grades for one direction; take a category of a finding "
            "with finding.vector(category=…)"
        )
    style = style_of(template)
    prompts = render(model.tokenizer, concept.stimuli, style, concept.speaker)
    check_prompts(model, prompts, concept.name)
    chosen = tuple(range(model.n_layers)) if layers is None else tuple(sorted(set(layers)))
    acts = extract(model, prompts, (site,), chosen, open_store(store), label=concept.name)[site]
    made = make_vector(
        estimator(acts.normalised * acts.rms[:, None], concept.stimuli), chosen, site=site, concept=concept.name,
        model=describe_source(model), template=template, estimator=getattr(estimator, "__name__", "own"),
        rms=tuple(float(x) for x in acts.rms), stimuli=concept.digest, n_layers=model.n_layers,
    )  # fmt: skip
    check_not_zero(made)
    return made


def describe_source(model: Model) -> dict[str, Any]:
    """The model a vector was fitted in, as its file says it."""
    return {
        "name": model.name,
        "revision": model.revision,
        "weights": model.weights,
        "architecture": model.architecture,
    }
