"""Is a concept attenuated inside the aligned model, at which layers, and beyond what happens to controls?

Every text of every concept is run through both models and pooled at its read position. Per scenario the two
labels' activations are subtracted and divided by the model's own rms; the Gram matrix of these differences
is all that strength needs (section 2 of the method), and `contrasts` turns the matrices of both models into
attenuation, `specific`, bands, onset and decision (section 3). Beside it stand a cross-fitted probe's AUROC,
the embedding layer and the lexical floor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from empathy_probes.activations import Activations
from empathy_probes.concepts import Concept
from empathy_probes.contrasts import Contrast, TemplateShift, compare, did
from empathy_probes.decisions import Judgement, judge, judge_controls
from empathy_probes.design import Design, describe_design, design_study
from empathy_probes.extraction import extract
from empathy_probes.pairs import ModelPair
from empathy_probes.probes import N_FOLDS, cross_fitted_scores, lexical_scores
from empathy_probes.stats import Curve, auroc_attenuation, auroc_difference, auroc_interval, grouped_folds
from empathy_probes.stimuli import StimulusSet
from empathy_probes.store import Store, load_record, open_store, save_record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
]


@dataclass(frozen=True)
class Settings:
    """Choices that change a number without changing what was measured."""

    margin: float = 0.10
    """δ: an attenuation within it counts as none."""
    specific_margin: float = 0.20
    """δ for the equivalence of `specific`."""
    draws: int = 1000
    """Multiplier draws behind every band."""
    seed: int = 0


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
    def beats_words(self) -> Bool[np.ndarray, " layer"]:
        """Layers at which the base's probe exceeds the bag of words beyond chance."""
        words = np.broadcast_to(self.text_scores, self.scores[0].shape)
        return auroc_difference(words, self.scores[0], self.labels, self.item_units).lower > 0


@dataclass(frozen=True)
class Finding:
    """Attenuation of every concept at every layer, under every template and at every site measured."""

    measurements: tuple[Measurement, ...]
    n_layers: int
    settings: Settings = field(default_factory=Settings)
    flags: tuple[str, ...] = ()
    """What holds for the whole study, such as `no_chat_template`."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Digests of models, tokenizers and stimuli, and how concepts are described."""

    @property
    def key(self) -> str:
        """What kind of result this is, also in saved files."""
        return "attenuation"

    @property
    def options(self) -> dict[str, Any]:
        """Every choice behind the numbers, as plain data."""
        return study_options(self.provenance, self.settings)

    @property
    def templates(self) -> tuple[str, ...]:
        """Templates measured, in order."""
        return tuple(dict.fromkeys(m.template for m in self.measurements))

    @property
    def sites(self) -> tuple[str, ...]:
        """TransformerLens names of the sites measured, in order."""
        return tuple(dict.fromkeys(m.site for m in self.measurements))

    def select(self, template: str, site: str, role: str | None = None) -> tuple[Measurement, ...]:
        """Measurements under one template at one site, of one role or of all."""
        return tuple(
            m
            for m in self.measurements
            if m.template == template and m.site == site and role in (None, m.role)
        )

    def judgements(self, template: str, site: str) -> Mapping[str, Judgement]:
        """The decision and its quantities for every concept, targets and controls."""
        return self._judged[template, site]

    @cached_property
    def _judged(self) -> dict[tuple[str, str], dict[str, Judgement]]:
        s = self.settings
        draw: Any = {"margin": s.margin, "draws": s.draws, "seed": s.seed}
        judged: dict[tuple[str, str], dict[str, Judgement]] = {}
        for template in self.templates:
            for site in self.sites:
                targets = [m.contrast for m in self.select(template, site, "target")]
                controls = [m.contrast for m in self.select(template, site, "control")]
                of_targets = (
                    judge(targets, controls, specific_margin=s.specific_margin, **draw) if targets else ()
                )
                of_controls = judge_controls(controls, **draw) if controls else ()
                judged[template, site] = {j.name: j for j in (*of_targets, *of_controls)}
        return judged

    def to_frame(self) -> pd.DataFrame:
        """The rows of `attenuation.csv`; a blank cell is NaN and has a flag that says why."""
        return self._frame.copy()

    @cached_property
    def _frame(self) -> pd.DataFrame:
        rows: list[dict[str, Any]] = []
        for m in self.measurements:
            judgement = self.judgements(m.template, m.site)[m.concept]
            rows += _strength_rows(m, judgement, self.n_layers, self.flags)
            rows += _auroc_rows(m, self.n_layers, self.flags)
            if m.site == self.sites[-1]:
                rows.append(_lexical_row(m, self.n_layers))
        rows += self._template_rows()
        frame = pd.DataFrame(rows, columns=COLUMNS)
        frame["layer"] = frame["layer"].astype("Int64")
        return frame

    def _template_rows(self) -> list[dict[str, Any]]:
        if not {"raw", "shared"} <= set(self.templates):
            return []
        rows: list[dict[str, Any]] = []
        for site in self.sites:
            shared = {m.concept: m for m in self.select("shared", site)}
            for raw in self.select("raw", site):
                shift = did(
                    shared[raw.concept].contrast, raw.contrast, self.settings.draws, self.settings.seed
                )
                rows += _did_rows(raw, shift, self.n_layers)
        return rows

    def onset_frame(self) -> pd.DataFrame:
        """The rows of `onset.csv`: where each target's attenuation begins and where it is largest."""
        rows = []
        for template in self.templates:
            for site in self.sites:
                for m in self.select(template, site, "target"):
                    j = self.judgements(template, site)[m.concept]
                    onset, peak = j.onset, j.peak
                    flags = [*(["onset_may_be_absent"] if onset.includes_none and onset.members else [])]
                    flags += ["no_onset"] if not onset.members else []
                    flags += [flag for flag in self.flags if flag == "no_chat_template"]
                    rows.append(
                        {
                            "concept": m.concept, "template": template, "site": site, "measure": "strength",
                            "onset_lower": onset.lower, "onset_upper": onset.upper, "peak_layer": peak.best,
                            "peak_lower": peak.lower, "peak_upper": peak.upper, "flags": ";".join(flags),
                        }
                    )  # fmt: skip
        frame = pd.DataFrame(rows, columns=ONSET_COLUMNS)
        layers = ["onset_lower", "onset_upper", "peak_layer", "peak_lower", "peak_upper"]
        frame[layers] = frame[layers].astype("Int64")
        return frame

    def save(self, path: str | Path) -> None:
        """Save as one safetensors file with a JSON header."""
        save_record(self, path)

    def plot(self) -> Figure:
        """Attenuation by layer."""
        from empathy_probes import plots

        return plots.plot(self)

    def _repr_html_(self) -> str:
        from empathy_probes import report

        return report.finding_html(self)


TYPES = {cls.__name__: cls for cls in (Finding, Measurement, Settings)}


def study_options(provenance: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Every choice behind the numbers of a design measured with these settings, as plain data."""
    base = provenance["base"]
    return {**provenance["design"], **asdict(settings), "dtype": base["dtype"], "device": base["device"]}


def load_finding(path: str | Path) -> Finding:
    """Load what `Finding.save` wrote."""
    return load_record(path, TYPES)


# ---------------------------------------------------------------------------------------------------------
# Measurement


def measure_attenuation(
    pair: ModelPair,
    concepts: Concept | Sequence[Concept],
    controls: Sequence[Concept] = (),
    *,
    template: str = "both",
    sites: Sequence[str] = ("resid_post",),
    layers: Sequence[int] | None = None,
    margin: float = 0.10,
    draws: int = 1000,
    seed: int = 0,
    store: str | None = None,
) -> Finding:
    """Measure strength and decodability of concepts in both models, layer by layer.

    Args:
        pair: base and aligned model.
        concepts: targets.
        controls: contrasts that have nothing to do with affect or stance; six or more for a decision on
            `specific`.
        template: raw, shared, own or both (raw and shared).
        sites: TransformerLens names.
        layers: 0-based blocks; all by default. The input of block 0 is always measured beside them.
        margin: δ of section 3.
        draws: multiplier draws behind every band.
        seed: of folds and draws.
        store: activation store; the default one if None.

    Raises:
        InputError: something cannot be measured; nothing has run then.
    """
    targets = (concepts,) if isinstance(concepts, Concept) else tuple(concepts)
    design = design_study(pair, targets, controls, template=template, sites=sites, layers=layers)
    return measure(design, Settings(margin=margin, draws=draws, seed=seed), open_store(store))


def measure(design: Design, settings: Settings, store: Store) -> Finding:
    """Run a design: extraction (from the store where possible), kernels, probes."""
    measurements: list[Measurement] = []
    texts = {
        concept.name: lexical_scores(
            [item.text for item in concept.stimuli.items], _labels(concept.stimuli),
            [item.unit for item in concept.stimuli.items], settings.seed,
        )
        for concept in design.concepts
    }  # fmt: skip
    acts: dict[tuple[str, str, int], dict[str, Activations]] = {}
    # One model after the other, so that only pooled rows of both are ever held.
    for side, model in enumerate(design.pair.models):
        for template in design.templates:
            for concept in design.concepts:
                label = f"{('base', 'aligned')[side]} · {template} · {concept.name}"
                prompts = design.prompts[concept.name, template][side]
                acts[concept.name, template, side] = extract(
                    model, prompts, design.components, design.layers, store, label=label
                )
    for template in design.templates:
        for component in design.components:
            for concept in design.concepts:
                both = [acts[concept.name, template, side][component] for side in (0, 1)]
                measurements.append(
                    _measure(
                        concept, template, both, texts[concept.name], settings.seed, design.pair.identical
                    )
                )
    return Finding(
        tuple(measurements), design.pair.base.n_layers, settings, design.flags, describe_design(design)
    )


def _labels(stimuli: StimulusSet) -> Int[np.ndarray, " item"]:
    return np.array([int(item.label) for item in stimuli.items])


def _measure(
    concept: Concept,
    template: str,
    acts: Sequence[Activations],
    text_scores: np.ndarray,
    seed: int,
    same_model: bool,
) -> Measurement:
    stimuli = concept.stimuli
    labels, units = _labels(stimuli), [item.unit for item in stimuli.items]
    folds = grouped_folds(units, N_FOLDS, seed)
    normalised = [a.normalised for a in acts]
    differences = [scenario_differences(rows, stimuli) for rows in normalised]
    # One memory order, so that sums over a saved and reloaded array round alike.
    kernels = np.ascontiguousarray([np.einsum("sld,tld->lst", d, d) for d in differences], np.float32)
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
        scores=np.stack([cross_fitted_scores(rows, labels, folds) for rows in normalised]),
        text_scores=text_scores,
        directions=np.stack([d.mean(0) for d in differences]) * rms[..., None],
        rms=rms,
        same_model=same_model,
    )


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


# ---------------------------------------------------------------------------------------------------------
# Rows


def _place(m: Measurement, layer: int | None, n_layers: int, measure: str) -> dict[str, Any]:
    return {
        "concept": m.concept, "role": m.role, "template": m.template,
        "site": m.site if layer is not None else "text", "layer": layer,
        "depth": None if layer is None else (layer + 1) / n_layers,
        "measure": measure, "n_scenarios": len(m.units),
    }  # fmt: skip


def _cells(name: str, curve: Curve, i: int) -> dict[str, float]:
    return {name: curve.value[i], f"{name}_lower": curve.lower[i], f"{name}_upper": curve.upper[i]}


def _strength_rows(m: Measurement, j: Judgement, n_layers: int, flags: Sequence[str]) -> list[dict[str, Any]]:
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
            row |= _cells(name, curve, i)
        if m.role == "target":
            row |= _cells("specific", j.specific, i)
        row |= {"band_lower": j.band.lower[i], "band_upper": j.band.upper[i], "p_adjusted": j.p_adjusted[i]}
        own = [*j.flags[i], *([] if m.beats_words[i] else ["below_lexical_floor"]), *flags]
        rows.append(row | {"decision": j.decision[i], "flags": ";".join(dict.fromkeys(own))})
    return rows


def _auroc_rows(m: Measurement, n_layers: int, flags: Sequence[str]) -> list[dict[str, Any]]:
    base, aligned = (auroc_interval(scores, m.labels, m.item_units) for scores in m.scores)
    difference = auroc_difference(m.scores[0], m.scores[1], m.labels, m.item_units)
    attenuation, ceiling = auroc_attenuation(m.scores[0], m.scores[1], m.labels, m.item_units)
    rows = []
    for i, layer in enumerate(m.layers):
        row = _place(m, layer, n_layers, "auroc")
        for name, curve in (
            ("base", base),
            ("aligned", aligned),
            ("difference", difference),
            ("attenuation", attenuation),
        ):
            row |= _cells(name, curve, i)
        own = ["ceiling"] if ceiling[i] else []
        if np.isnan(attenuation.value[i]) and not ceiling[i]:
            own.append("base_not_detected" if base.lower[i] <= 0.5 else "ceiling")
        own += [] if m.beats_words[i] else ["below_lexical_floor"]
        rows.append(row | {"decision": "", "flags": ";".join([*own, *flags])})
    return rows


def _lexical_row(m: Measurement, n_layers: int) -> dict[str, Any]:
    floor = auroc_interval(m.text_scores[None], m.labels, m.item_units)
    row = _place(m, None, n_layers, "auroc") | _cells("base", floor, 0) | _cells("aligned", floor, 0)
    return row | {"decision": "", "flags": "lexical_floor"}


def _did_rows(m: Measurement, shift: TemplateShift, n_layers: int) -> list[dict[str, Any]]:
    """θ_shared − θ_raw as `difference`, and the same as an attenuation."""
    rows = []
    for i, layer in enumerate(m.layers):
        row = _place(m, layer, n_layers, "strength") | {"template": "did"}
        row |= _cells("difference", shift.theta, i) | _cells("attenuation", shift.attenuation, i)
        row |= {"band_lower": shift.band.lower[i], "band_upper": shift.band.upper[i]}
        rows.append(
            row | {"p_adjusted": shift.p_adjusted[i], "decision": "", "flags": ";".join(shift.flags[i])}
        )
    return rows
