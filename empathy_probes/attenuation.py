"""Is a concept attenuated inside the aligned model, at which layers, and beyond what happens to controls?

Every text of every concept, and the neutral texts, run through both models and are pooled at their read position;
`measurements` reduces them, `contrasts` and `decisions` turn the kernels of both models into attenuation, `specific`,
bands, onset and decision (sections 2 and 3 of the method), and `rows` writes them down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd

from empathy_probes import __version__
from empathy_probes.activations import Activations
from empathy_probes.alignment import NeutralMap, fit_map
from empathy_probes.coding import contrast_codes, label_numbers
from empathy_probes.concepts import Concept
from empathy_probes.contrasts import did
from empathy_probes.decisions import Judgement, judge, judge_controls
from empathy_probes.design import Design, Settings, describe_design, design_study, neutral_name
from empathy_probes.errors import InputError
from empathy_probes.extraction import extract, request_key
from empathy_probes.measurements import Measurement, Views, measure_concept
from empathy_probes.pairs import ModelPair
from empathy_probes.probes import lexical_scores
from empathy_probes.results import Result
from empathy_probes.rows import COLUMNS, ONSET_COLUMNS, did_rows, lexical_row, measurement_rows
from empathy_probes.store import Store, digest_of, load_record, open_store
from empathy_probes.vectors import SteeringVector, check_not_zero, make_vector


@dataclass(frozen=True)
class Finding(Result):
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

    def vector(
        self,
        model: str,
        concept: str | None = None,
        *,
        layer: int | None = None,
        template: str | None = None,
        site: str | None = None,
        category: str | None = None,
    ) -> SteeringVector:
        """Direction of a concept in one of the models, from label 0 to label 1, at one layer or at all measured.

        Args:
            model: base or aligned.
            concept: may be left out where there is one target.
            layer: 0-based block; all by default.
            template, site: the first one measured by default.
            category: needed where the concept has categories, and only there.

        Raises:
            InputError: there is no such direction, or it is zero at the layer; the message says what there is.
        """
        if model not in MODELS:
            raise InputError(f"vector got the model '{model}', expected base or aligned; choose one")
        targets = tuple(dict.fromkeys(m.concept for m in self.measurements if m.role == "target"))
        if concept is None and len(targets) > 1:
            raise InputError(
                f"vector got no concept and the finding has {len(targets)} targets, expected one of {', '.join(targets)}; name it"
            )
        wanted = (concept or targets[0], template or self.templates[0], site or self.sites[0])
        found = [m for m in self.measurements if (m.concept, m.template, m.site) == wanted]
        if not found:
            known = ", ".join(m.key for m in self.measurements)
            raise InputError(
                f"nothing was measured at {'/'.join(wanted)}, expected one of {known}; choose among these"
            )
        (m,) = found
        if (category in m.categories) != bool(m.categories) or (category and not m.categories):
            expected = f"one of {', '.join(m.categories)}" if m.categories else "none"
            raise InputError(
                f"vector got the category '{category}' of '{m.concept}', expected {expected}; choose so"
            )
        side, rows = MODELS.index(model), [i for i, block in enumerate(m.layers) if block >= 0]
        contrast = m.categories.index(category) if category else 0
        source = self.provenance[model]
        made = make_vector(
            m.directions[side, contrast][rows], [m.layers[i] for i in rows], site=m.site, concept=m.concept,
            category=category or "", template=m.template, estimator=ESTIMATOR[m.kind],
            model={name: source[name] for name in ("name", "revision", "weights", "architecture")},
            rms=tuple(float(m.rms[side][i]) for i in rows), seed=self.settings.seed,
            stimuli=self.provenance["concepts"][m.concept]["digest"], n_layers=self.n_layers,
        )  # fmt: skip
        if layer is None:
            return made
        check_not_zero(made.at(layer))
        return made.at(layer)

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
            rows += measurement_rows(m, judgement, self.n_layers, self.flags)
            if m.site == self.sites[-1]:
                rows.append(lexical_row(m, self.n_layers))
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
                rows += did_rows(raw, shift, self.n_layers)
        return rows

    def onset_frame(self) -> pd.DataFrame:
        """The rows of `onset.csv`: where each target's attenuation begins, is largest, and ends."""
        rows = []
        for template in self.templates:
            for site in self.sites:
                for m in self.select(template, site, "target"):
                    j = self.judgements(template, site)[m.concept]
                    onset, peak, loss = j.onset, j.peak, j.loss
                    flags = [*(["onset_may_be_absent"] if onset.includes_none and onset.members else [])]
                    flags += ["no_onset"] if not onset.members else []
                    flags += [flag for flag in self.flags if flag == "no_chat_template"]
                    rows.append(
                        {
                            "concept": m.concept, "template": template, "site": site, "measure": "strength",
                            "onset_lower": onset.lower, "onset_upper": onset.upper, "peak_layer": peak.best,
                            "peak_lower": peak.lower, "peak_upper": peak.upper, "flags": ";".join(flags),
                            "loss_lower": loss.lower, "loss_upper": loss.upper,
                        }
                    )  # fmt: skip
        frame = pd.DataFrame(rows, columns=ONSET_COLUMNS)
        layers = [name for name in ONSET_COLUMNS if name.split("_")[0] in ("onset", "peak", "loss")]
        frame[layers] = frame[layers].astype("Int64")
        return frame


MODELS = ("base", "aligned")
ESTIMATOR = {
    "binary": "difference of means, label 1 minus label 0, raw activation units",
    "graded": "slope of activations on the grade within scenarios, raw activation units per grade",
    "categorical": "difference of means, this category minus the others, raw activation units",
}
TYPES = {cls.__name__: cls for cls in (Finding, Measurement, Settings, Views)}


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
    controls: Concept | Sequence[Concept] = (),
    *,
    template: str = "both",
    sites: Sequence[str] = ("resid_post",),
    layers: Sequence[int] | None = None,
    margin: float = 0.10,
    draws: int = 1000,
    seed: int = 0,
    neutral: Sequence[str] | None = None,
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
        neutral: texts of no concept, for the map between models and the covariance; the shipped ones by default.
        store: activation store; the default one if None.

    Raises:
        InputError: something cannot be measured; nothing has run then.
    """
    design = design_study(
        pair, concepts, controls, template=template, sites=sites, layers=layers, neutral=neutral
    )
    return measure(design, Settings(margin=margin, draws=draws, seed=seed), open_store(store))


def measure(design: Design, settings: Settings, store: Store) -> Finding:
    """Run a design: extraction (from the store where possible), kernels, probes."""
    texts = {
        concept.name: lexical_scores(
            [item.text for item in concept.stimuli.items],
            contrast_codes(concept.stimuli.kind, label_numbers(concept.stimuli)),
            [item.unit for item in concept.stimuli.items], settings.seed,
        )
        for concept in design.concepts
    }  # fmt: skip
    acts: dict[tuple[str, str, int], dict[str, Activations]] = {}
    # One model after the other, so that only pooled rows of both are ever held.
    for side, model in enumerate(design.pair.models):
        for template in design.templates:
            for name in (*(concept.name for concept in design.concepts), *design.neutral_names):
                label = f"{('base', 'aligned')[side]} · {template} · {name}"
                acts[name, template, side] = extract(
                    model,
                    design.prompts[name, template][side],
                    design.components,
                    design.layers,
                    store,
                    label=label,
                )
    maps: dict[tuple[str, str, str], NeutralMap] = {}

    def work_out(concept: Concept, template: str, component: str) -> Measurement:
        own, neutral = (
            [acts[name, template, side][component] for side in (0, 1)]
            for name in (concept.name, neutral_name(concept))
        )
        place = (neutral_name(concept), template, component)
        # Concepts read at the same kind of position share their neutral texts, and so the map.
        if place not in maps:
            maps[place] = fit_map(*(x.normalised for x in neutral))
        return measure_concept(
            concept, template, own, neutral, texts[concept.name], settings.seed, design.pair.identical,
            carried=maps[place],
        )  # fmt: skip

    # Probes, their nulls and d′ take longer than the forward passes of a small model: every concept's are kept.
    measurements = tuple(
        store.remember_record(
            _measurement_key(design, concept, template, component, settings.seed),
            partial(work_out, concept, template, component),
            TYPES,
        )
        for template in design.templates
        for component in design.components
        for concept in design.concepts
    )
    return Finding(measurements, design.pair.base.n_layers, settings, design.flags, describe_design(design))


def _measurement_key(design: Design, concept: Concept, template: str, component: str, seed: int) -> str:
    """A digest of everything that decides a measurement."""
    layers = [layer for layer in design.layers if layer >= 0 or component == "resid_post"]
    read = [
        request_key(model, design.prompts[name, template][side], component, layers)
        for name in (concept.name, neutral_name(concept))
        for side, model in enumerate(design.pair.models)
    ]
    described = [concept.name, concept.role, concept.digest, template, component, seed, design.pair.identical]
    # Of one version too a store may hold older ones: the number goes up with what is in a `Measurement`.
    return digest_of(["measurement", 8, __version__, read, described])
