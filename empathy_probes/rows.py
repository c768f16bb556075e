"""Measurements as the rows of attenuation.csv: one per concept, template, site, layer and measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from empathy_probes.bits import bits, bits_covariance, bits_difference, entropy, grade_bits, grade_entropy
from empathy_probes.coding import coarse_numbers
from empathy_probes.contrasts import Contrast, TemplateShift
from empathy_probes.decisions import Judgement
from empathy_probes.geometry import cosine_from_kernels
from empathy_probes.measurements import ALIGNED, BASE, MAPPED, OWN, PLAIN, Measurement
from empathy_probes.probes import paired_t
from empathy_probes.stats import Curve, critical_t, fieller_ratio

COLUMNS = [
    "concept",
    "role",
    "template",
    "site",
    "layer",
    "depth",
    "measure",
    "n_scenarios",
    "base",
    "base_lower",
    "base_upper",
    "aligned",
    "aligned_lower",
    "aligned_upper",
    "difference",
    "difference_lower",
    "difference_upper",
    "attenuation",
    "attenuation_lower",
    "attenuation_upper",
    "specific",
    "specific_lower",
    "specific_upper",
    "band_lower",
    "band_upper",
    "p_adjusted",
    "decision",
    "flags",
]
ONSET_COLUMNS = [
    "concept",
    "template",
    "site",
    "measure",
    "onset_lower",
    "onset_upper",
    "peak_layer",
    "peak_lower",
    "peak_upper",
    "flags",
    "loss_lower",
    "loss_upper",
]


ALPHA = 0.05


def measurement_rows(
    m: Measurement, judgement: Judgement, n_layers: int, flags: Sequence[str]
) -> list[dict[str, Any]]:
    """All rows of one measurement.

    Args:
        m: the measurement.
        judgement: what was decided about it.
        n_layers: of the models, for the depth.
        flags: of the whole study.
    """
    return [
        *strength_rows(m, judgement, n_layers, flags),
        *reading_rows(m, n_layers, flags),
        *slope_rows(m, n_layers, flags),
        *separation_rows(m, n_layers, flags),
        *bits_rows(m, n_layers, flags),
        *granularity_rows(m, n_layers, flags),
        *cosine_rows(m, n_layers, flags),
        *transfer_rows(m, n_layers, flags),
    ]


def _place(m: Measurement, layer: int | None, n_layers: int, measure: str) -> dict[str, Any]:
    return {
        "concept": m.concept, "role": m.role, "template": m.template,
        "site": m.site if layer is not None else "text", "layer": layer,
        "depth": None if layer is None else (layer + 1) / n_layers,
        "measure": measure, "n_scenarios": len(m.units),
    }  # fmt: skip


def strength_rows(m: Measurement, j: Judgement, n_layers: int, flags: Sequence[str]) -> list[dict[str, Any]]:
    c = m.contrast
    rows = []
    for i, layer in enumerate(m.layers):
        row = _place(m, layer, n_layers, "strength")
        for name, curve in (
            ("base", c.base),
            ("aligned", c.aligned),
            ("difference", c.difference),
            ("attenuation", c.attenuation),
        ):
            row |= curve.cells(name, i)
        if m.role == "target":
            row |= j.specific.cells("specific", i)
        row |= {"band_lower": j.band.lower[i], "band_upper": j.band.upper[i], "p_adjusted": j.p_adjusted[i]}
        own = [*j.flags[i], *([] if m.beats_words[i] else ["below_lexical_floor"])]
        own += [*(["not_above_random"] if m.views.random_p[0, i] > ALPHA else []), *flags]
        rows.append(row | {"decision": j.decision[i], "flags": ";".join(dict.fromkeys(own))})
    return rows


def reading_rows(m: Measurement, n_layers: int, flags: Sequence[str]) -> list[dict[str, Any]]:
    """How well the probe reads held-out texts: AUROC (categories: its mean), or correlation with the grades."""
    base, aligned = m.reading(BASE), m.reading(ALIGNED)
    curves = {
        "base": base,
        "aligned": aligned,
        "difference": m.reading_difference((BASE, OWN), (ALIGNED, OWN)),
    }
    ceiling = np.zeros(len(m.layers), bool)
    if m.kind != "graded":
        curves["attenuation"], ceiling = m.reading_attenuation()
    rows = []
    for i, layer in enumerate(m.layers):
        row = _place(m, layer, n_layers, m.measure)
        for name, curve in curves.items():
            row |= curve.cells(name, i)
        own = ["ceiling"] if ceiling[i] else []
        if "attenuation" in curves and np.isnan(curves["attenuation"].value[i]) and not ceiling[i]:
            own.append("base_not_detected" if base.lower[i] <= 0.5 else "ceiling")
        own += [] if m.beats_words[i] else ["below_lexical_floor"]
        own += ["not_above_shuffled"] if m.views.shuffled_p[0, i] > ALPHA else []
        row["p_adjusted"] = m.views.shuffled_p[0, i]
        rows.append(row | {"decision": "", "flags": ";".join([*own, *flags])})
    return rows


def slope_rows(m: Measurement, n_layers: int, flags: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Graded labels: grades that the probe's reading of held-out texts moves per grade within a scenario; 1 is all."""
    if m.kind != "graded":
        return iter(())
    base, aligned = (
        scenario_slopes(scores[:, 0], m.labels, m.item_scenarios, m.item_units) for scores in m.scores
    )
    curves = {"base": paired_t(base), "aligned": paired_t(aligned), "difference": paired_t(aligned - base)}
    return _curve_rows(m, n_layers, "slope", curves, [flags] * len(m.layers))


def scenario_slopes(
    scores: Float[np.ndarray, "layer item"],
    grades: Float[np.ndarray, " item"],
    scenarios: Sequence[str],
    units: Sequence[str],
) -> Float[np.ndarray, "layer unit"]:
    """Least-squares slope of the scores on the grades within each scenario, averaged over those of a unit."""
    first, place = np.unique(scenarios, return_index=True, return_inverse=True)[1:]
    member = np.eye(len(first))[place]
    grade = grades - (grades @ member / member.sum(0))[place]
    slopes = (scores * grade) @ member / (grade**2 @ member)
    of_unit = np.unique(np.asarray(units)[first], return_inverse=True)[1]
    shared = np.eye(of_unit.max() + 1)[of_unit]
    return np.asarray(slopes @ shared / shared.sum(0))


def lexical_row(m: Measurement, n_layers: int) -> dict[str, Any]:
    row = _place(m, None, n_layers, m.measure)
    row |= m.lexical.cells("base", 0) | m.lexical.cells("aligned", 0)
    return row | {"decision": "", "flags": "lexical_floor"}


def did_rows(m: Measurement, shift: TemplateShift, n_layers: int) -> list[dict[str, Any]]:
    """θ_shared − θ_raw as `difference`, and the same as an attenuation."""
    rows = []
    for i, layer in enumerate(m.layers):
        row = _place(m, layer, n_layers, "strength") | {"template": "did"}
        row |= shift.theta.cells("difference", i) | shift.attenuation.cells("attenuation", i)
        row |= {"band_lower": shift.band.lower[i], "band_upper": shift.band.upper[i]}
        rows.append(
            row | {"p_adjusted": shift.p_adjusted[i], "decision": "", "flags": ";".join(shift.flags[i])}
        )
    return rows


def _curve_rows(
    m: Measurement, n_layers: int, measure: str, curves: dict[str, Curve], flags: Sequence[Sequence[str]]
) -> Iterator[dict[str, Any]]:
    for i, layer in enumerate(m.layers):
        row = _place(m, layer, n_layers, measure)
        for name, curve in curves.items():
            row |= curve.cells(name, i)
        yield row | {"decision": "", "flags": ";".join(dict.fromkeys(flags[i]))}


def separation_rows(m: Measurement, n_layers: int, flags: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Crossnobis d′."""
    c: Contrast = m.separation
    curves = {"base": c.base, "aligned": c.aligned, "difference": c.difference, "attenuation": c.attenuation}
    few = ["few_neutral"] if m.views.map_underdetermined else []
    return _curve_rows(m, n_layers, "d_prime", curves, [[*own, *few, *flags] for own in c.flags])


def bits_rows(m: Measurement, n_layers: int, flags: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What a probe extracts about the label."""
    if m.kind == "graded":
        return _bits_rows(
            m, n_layers, flags, "bits", m.views.losses, grade_bits, grade_entropy(m.labels, m.item_units)
        )
    return _bits_rows(
        m, n_layers, flags, "bits", m.views.losses, bits, entropy(m.labels.astype(int), m.item_units)
    )


def granularity_rows(m: Measurement, n_layers: int, flags: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What a probe extracts about the fine category when the coarse one is known."""
    coarse = coarse_numbers(m.categories, m.labels)
    if coarse is None:
        return iter(())
    whole = entropy(m.labels.astype(int), m.item_units, coarse)
    return _bits_rows(m, n_layers, flags, "granularity", m.views.fine_losses, bits, whole)


def _bits_rows(
    m: Measurement,
    n_layers: int,
    flags: Sequence[str],
    measure: str,
    both: Float[np.ndarray, "model=2 what=4 layer unit"],
    read: Callable[[Float[np.ndarray, "what=4 layer unit"], float], Curve],
    whole: float,
) -> Iterator[dict[str, Any]]:
    """Compared as a difference, and relative to the base where that is detected."""
    losses = both.astype(float)
    base, aligned = (read(side, whole) for side in losses)
    critical = critical_t(losses.shape[-1] - 1)
    ratio = fieller_ratio(base.value, aligned.value, bits_covariance(losses), critical)
    kept = Curve(ratio.value, ratio.lower, ratio.upper)
    positive = base.lower > 0
    attenuation = Curve(*(np.where(positive, 1 - x, np.nan) for x in (kept.value, kept.upper, kept.lower)))
    if m.same_model:
        attenuation = Curve(*(np.where(positive, 0.0, x) for x in vars(attenuation).values()))
    curves = {
        "base": base,
        "aligned": aligned,
        "difference": bits_difference(*losses),
        "attenuation": attenuation,
    }
    own = [[*([] if known else ["base_not_detected"]), *flags] for known in positive]
    return _curve_rows(m, n_layers, measure, curves, own)


def cosine_rows(m: Measurement, n_layers: int, flags: Sequence[str]) -> list[dict[str, Any]]:
    """The aligned model's direction against the base's: 1 is the same; the base's own cosine is 1 by definition."""
    base, aligned = m.kernels.astype(float)
    one = np.ones(len(m.layers))
    rows: list[dict[str, Any]] = []
    for mapped, name in enumerate(("cosine", "cosine_mapped")):
        extra = m.views.mapping if mapped else None
        cosine = cosine_from_kernels(base, aligned, m.views.cross[mapped].astype(float), extra)
        cosine = Curve(one, one, one) if m.same_model else cosine
        difference = Curve(cosine.value - 1, cosine.lower - 1, cosine.upper - 1)
        known = ~np.isnan(cosine.value)
        own = [[*([] if k else ["weak_signal"]), *_map_flags(m, mapped), *flags] for k in known]
        curves = {"base": Curve(one, one, one), "aligned": cosine, "difference": difference}
        rows += _curve_rows(m, n_layers, name, curves, own)
    return rows


def _map_flags(m: Measurement, mapped: int) -> list[str]:
    return ["map_underdetermined"] if mapped and m.views.map_underdetermined else []


def transfer_rows(m: Measurement, n_layers: int, flags: Sequence[str]) -> list[dict[str, Any]]:
    """How well one model's probe reads the base (column base) and the aligned model (column aligned)."""
    rows: list[dict[str, Any]] = []
    for mapped, suffix in enumerate(("", "_mapped")):
        for fitted, name in enumerate(("transfer_base_to_aligned", "transfer_aligned_to_base")):
            own, other = (fitted, OWN), (fitted, MAPPED if mapped else PLAIN)
            read = (own, other) if fitted == BASE else (other, own)
            curves = {
                "base": m.reading(*read[0]),
                "aligned": m.reading(*read[1]),
                "difference": m.reading_difference(*read),
            }
            flagged = [[*_map_flags(m, mapped), *flags]] * len(m.layers)
            rows += _curve_rows(m, n_layers, name + suffix, curves, flagged)
    return rows
