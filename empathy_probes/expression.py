"""Does the concept reach the output?  Coupling: how far what a text says moves how the model answers.

c_s is the readout of a scenario's texts with label 1 minus that of its texts with label 0, in nats; no text is generated
and nothing is judged. Its mean over scenarios is compared between the models like a strength in one dimension, whose
kernel is c_s c_t: the same ratio, `specific`, bands and decisions as in the encode stage; a change of sign is told apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from empathy_probes import __version__
from empathy_probes.concepts import Concept
from empathy_probes.contrasts import Contrast, compare
from empathy_probes.decisions import Judgement, judge, judge_controls
from empathy_probes.design import Design, Settings, describe_design, design_study
from empathy_probes.pairs import ModelPair
from empathy_probes.readouts import ask_design, read_out, readable, scenario_coupling
from empathy_probes.results import Result
from empathy_probes.stats import Curve, critical_t, fieller_ratio, mean_interval
from empathy_probes.store import Store, digest_of, open_store

COUPLING_COLUMNS = [
    "concept", "role", "template", "n_scenarios",
    *(f"{name}{end}" for name in ("base", "aligned", "difference", "attenuation", "specific") for end in ("", "_lower", "_upper")),
    "decision", "flags",
]  # fmt: skip


@dataclass(frozen=True)
class CoupledConcept:
    """One concept's readouts in both models under one template."""

    concept: str
    role: str
    template: str
    units: tuple[str, ...]
    coupling: Float[np.ndarray, "model=2 unit"]
    """c_s in nats: base, aligned."""
    items: tuple[str, ...]
    readouts: Float[np.ndarray, "model=2 item"]
    """The readout of every text, in nats."""
    same_model: bool = False

    @cached_property
    def contrast(self) -> Contrast:
        """The size of the mean coupling in both models, sign aside."""
        kernels = np.einsum("ms,mt->mst", self.coupling, self.coupling)[:, None]
        return compare(self.concept, self.units, kernels, (0,), same_model=self.same_model)

    @cached_property
    def means(self) -> Curve:
        """Mean coupling of (base, aligned), 95 % t interval over scenarios."""
        return mean_interval(self.coupling)

    @cached_property
    def difference(self) -> Curve:
        """aligned − base, paired."""
        return mean_interval(self.coupling[1] - self.coupling[0])

    @cached_property
    def attenuation(self) -> Curve:
        """1 − aligned/base with Fieller's interval, one entry; blank where the base's coupling is not detected."""
        n = len(self.units)
        base, aligned = self.coupling.mean(1, keepdims=True)
        covariance = np.cov(self.coupling)[..., None] / n
        ratio = fieller_ratio(base, aligned, covariance, critical_t(n - 1))
        ends = (1 - ratio.value, 1 - ratio.upper, 1 - ratio.lower)
        zero = self.same_model and not np.isnan(ratio.value)
        return Curve(*(np.where(zero, 0.0, x) for x in ends))


@dataclass(frozen=True)
class Coupling(Result):
    """Coupling of every concept that has a readout, under every template."""

    concepts: tuple[CoupledConcept, ...]
    settings: Settings = field(default_factory=Settings)
    skipped: tuple[str, ...] = ()
    """Concepts without a readout."""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What kind of result this is, also in saved files."""
        return "coupling"

    @property
    def templates(self) -> tuple[str, ...]:
        """Templates measured, in order."""
        return tuple(dict.fromkeys(c.template for c in self.concepts))

    def select(self, template: str, role: str | None = None) -> tuple[CoupledConcept, ...]:
        """Concepts under one template, of one role or of all."""
        return tuple(c for c in self.concepts if c.template == template and role in (None, c.role))

    def judgements(self, template: str) -> Mapping[str, Judgement]:
        """The decision about every concept's coupling."""
        return self._judged[template]

    @cached_property
    def _judged(self) -> dict[str, dict[str, Judgement]]:
        s = self.settings
        draw: Any = {"margin": s.margin, "draws": s.draws, "seed": s.seed}
        found = {}
        for template in self.templates:
            targets, controls = (
                [c.contrast for c in self.select(template, role)] for role in ("target", "control")
            )
            judged = judge(targets, controls, specific_margin=s.specific_margin, **draw) if targets else ()
            judged = (*judged, *(judge_controls(controls, **draw) if controls else ()))
            found[template] = {j.name: j for j in judged}
        return found

    def decision(self, concept: CoupledConcept) -> str:
        """attenuated, amplified, equivalent, inconclusive, or blank; a reversal is an attenuation beyond 1."""
        if _reversed(concept):
            return "attenuated"
        return str(self.judgements(concept.template)[concept.concept].decision[0])

    def to_frame(self) -> pd.DataFrame:
        """The rows of `coupling.csv`, in nats."""
        rows = []
        for c in self.concepts:
            j = self.judgements(c.template)[c.concept]
            row: dict[str, Any] = {
                "concept": c.concept, "role": c.role, "template": c.template, "n_scenarios": len(c.units),
            }  # fmt: skip
            parts: dict[str, tuple[float, float, float]] = {"base": _part(c.means, 0), "aligned": _part(c.means, 1), "difference": _part(c.difference),
                     "attenuation": _part(c.attenuation, 0)}  # fmt: skip
            if c.role == "target" and not _reversed(c):
                parts["specific"] = _part(j.specific, 0)
            for name, values in parts.items():
                row |= dict(zip((name, f"{name}_lower", f"{name}_upper"), values, strict=True))
            flags = [*j.flags[0], *(["sign_reversed"] if _reversed(c) else [])]
            rows.append(row | {"decision": self.decision(c), "flags": ";".join(dict.fromkeys(flags))})
        return pd.DataFrame(rows, columns=COUPLING_COLUMNS)


def _reversed(c: CoupledConcept) -> bool:
    """Whether both models are detected, on different sides of 0."""
    low, high = c.means.lower, c.means.upper
    return bool((low[0] > 0 and high[1] < 0) or (high[0] < 0 and low[1] > 0))


def _part(curve: Curve, index: int | None = None) -> tuple[float, float, float]:
    value, lower, upper = (
        float(x if index is None else x[index]) for x in (curve.value, curve.lower, curve.upper)
    )
    return value, lower, upper


def measure_coupling(
    pair: ModelPair,
    concepts: Concept | Sequence[Concept],
    controls: Concept | Sequence[Concept] = (),
    *,
    template: str = "both",
    margin: float = 0.10,
    draws: int = 1000,
    seed: int = 0,
    store: str | None = None,
) -> Coupling:
    """How far each concept moves the answer, in both models, in nats.

    Args:
        pair: base and aligned model.
        concepts: targets, each with a readout.
        controls: contrasts with a readout of their own; those without are left out.
        template: raw, shared, own or both.
        margin: δ of section 3 of the method.
        draws: multiplier draws behind every band.
        seed: of the draws.
        store: where readouts are kept; the default one if None.

    Raises:
        InputError: no concept has a readout, or an answer cannot be asked.
    """
    design = design_study(pair, concepts, controls, template=template)
    return couple(design, Settings(margin=margin, draws=draws, seed=seed), open_store(store))


def couple(design: Design, settings: Settings, store: Store) -> Coupling:
    """Measure the coupling of a design's concepts; readouts that are in the store are not computed again."""
    found = []
    for template in design.templates:
        for concept in readable(design):
            readouts = []
            for side, model in enumerate(design.pair.models):
                asked = ask_design(design, concept, template, side)
                key = digest_of(["readouts", __version__, model.fingerprint, asked.digest])
                readouts.append(store.remember(key, partial(read_out, model, asked)))
            stimuli = concept.stimuli
            values = np.stack(readouts)
            coupling = scenario_coupling(values.T, stimuli).T
            found.append(
                CoupledConcept(
                    concept.name, concept.role, template, stimuli.units, np.ascontiguousarray(coupling),
                    tuple(item.id for item in stimuli.items), values, design.pair.identical,
                )
            )  # fmt: skip
    skipped = tuple(c.name for c in design.concepts if c not in readable(design))
    return Coupling(tuple(found), settings, skipped, describe_design(design))
