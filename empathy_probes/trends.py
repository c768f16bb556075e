"""Does attenuation grow along a lineage?  One measurement over the base and every stage made from it.

All stages run the same prompts; K_k is the Gram matrix of stage k = 0 (base) … S, as in the encode stage. Each stage is
compared with the base, and with the stage before it. The trend is one comparison of the later stages with the earlier ones,
each weighted by its distance from the middle, w_k = |k − S/2| / Σ:

    K_late = Σ_{k > S/2} w_k K_k        K_early = Σ_{k < S/2} w_k K_k        theta = ½ log(U_late / U_early)

A mean of kernels is a kernel, so that intervals, the Fieller set, `specific`, bands and decisions are those of a pair. Where
all stages are alike theta is 0; where strength nowhere rises and somewhere falls it is below 0: a linear contrast against an
ordered alternative. A drift that all contrasts share cancels in `specific`, whatever its course. The trend says that later
stages keep less, not that every step takes: `monotone` says that it is decided and that each step surely brings back no more
than the margin (all of them must, so nothing is to be corrected), `reversed` that one surely brings back more. The trend is
the test; stages and steps are families of their own beside it. Level and power are in docs/simulations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from empathy_probes.activations import Activations
from empathy_probes.coding import scenario_contrasts
from empathy_probes.concepts import Concept
from empathy_probes.contrasts import Contrast, compare
from empathy_probes.decisions import Judgement, judge, judge_controls
from empathy_probes.design import Design, Settings, describe_design, design_study
from empathy_probes.errors import InputError
from empathy_probes.extraction import check_prompts, extract
from empathy_probes.kernels import strength_kernels
from empathy_probes.lineages import Lineage
from empathy_probes.measurements import unit_norms, unit_shares
from empathy_probes.models import Model, load_model
from empathy_probes.pairs import make_pair
from empathy_probes.prompts import render
from empathy_probes.results import Result
from empathy_probes.stimuli import StimulusSet
from empathy_probes.store import Store, load_record, open_store

_Judged = dict[tuple[str, str], list[dict[str, Judgement]]]
"""Per template and site, per comparison of one kind, what can be said of each concept."""
LINEAGE_COLUMNS = [
    "concept", "role", "template", "site", "comparison", "from", "to", "layer", "depth", "n_scenarios",
    *(f"{name}{end}" for name in ("attenuation", "specific") for end in ("", "_lower", "_upper")),
    "band_lower", "band_upper", "p_adjusted", "decision", "shape", "flags",
]  # fmt: skip


@dataclass(frozen=True)
class TracedConcept:
    """One concept in every stage of a lineage, under one template at one site."""

    concept: str
    role: str
    template: str
    site: str
    layers: tuple[int, ...]
    units: tuple[str, ...]
    kernels: Float[np.ndarray, "stage layer n n"]
    """D Dᵀ per stage (base first) and layer, in units of each model's own rms; float32."""
    same_model: tuple[bool, ...]
    """Per stage, whether its weights equal those of the stage before; False for the base."""

    def contrast(self, early: Mapping[int, float], late: Mapping[int, float]) -> Contrast:
        """Compare a weighted mean of stages with another."""
        sides = [
            sum(w * self.kernels[k].astype(np.float64) for k, w in side.items()) for side in (early, late)
        ]
        first, last = min((*early, *late)), max((*early, *late))
        same = all(self.same_model[first + 1 : last + 1])
        return compare(self.concept, self.units, np.stack(sides), self.layers, same_model=same)

    @cached_property
    def stages(self) -> tuple[Contrast, ...]:
        """Every stage against the base."""
        return tuple(self.contrast({0: 1.0}, {k: 1.0}) for k in range(1, len(self.kernels)))

    @cached_property
    def steps(self) -> tuple[Contrast, ...]:
        """Every stage against the one before it."""
        return tuple(self.contrast({k - 1: 1.0}, {k: 1.0}) for k in range(1, len(self.kernels)))

    @cached_property
    def trend(self) -> Contrast:
        """The later stages against the earlier ones."""
        return self.contrast(*trend_weights(len(self.kernels)))


def trend_weights(n_stages: int) -> tuple[dict[int, float], dict[int, float]]:
    """Weights of the earlier and of the later stages, each summing to 1, largest at the ends; mirror images of each other.

    >>> trend_weights(4)
    ({0: 0.75, 1: 0.25}, {3: 0.75, 2: 0.25})
    """
    middle, half = (n_stages - 1) / 2, n_stages // 2
    total = sum(middle - k for k in range(half))
    weights = [(middle - k) / total for k in range(half)]
    # In the same order on both sides, so that equal stages give equal sums to the last bit.
    return dict(enumerate(weights)), {n_stages - 1 - k: w for k, w in enumerate(weights)}


@dataclass(frozen=True)
class LineageTrend(Result):
    """Attenuation of every concept at every stage of a lineage, and its trend."""

    concepts: tuple[TracedConcept, ...]
    stages: tuple[str, ...]
    """Names, the base first."""
    n_layers: int
    settings: Settings = field(default_factory=Settings)
    flags: tuple[str, ...] = ()
    """What holds for the whole study, such as `no_chat_template`."""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What kind of result this is, also in saved files."""
        return "lineage"

    @property
    def templates(self) -> tuple[str, ...]:
        """Templates measured, in order."""
        return tuple(dict.fromkeys(c.template for c in self.concepts))

    @property
    def sites(self) -> tuple[str, ...]:
        """TransformerLens names of the sites measured, in order."""
        return tuple(dict.fromkeys(c.site for c in self.concepts))

    def select(self, template: str, site: str, role: str | None = None) -> tuple[TracedConcept, ...]:
        """Concepts under one template at one site, of one role or of all."""
        return tuple(
            c for c in self.concepts if c.template == template and c.site == site and role in (None, c.role)
        )

    def trends(self, template: str, site: str) -> Mapping[str, Judgement]:
        """What can be said about the later stages against the earlier ones, per concept."""
        return self._trends[template, site][0]

    def at_stage(self, template: str, site: str, stage: str) -> Mapping[str, Judgement]:
        """What can be said about a stage against the base, per concept.

        Raises:
            InputError: there is no such stage behind the base.
        """
        if stage not in self.stages[1:]:
            raise InputError(
                f"unknown stage '{stage}': expected one of {', '.join(self.stages[1:])}; choose one of these"
            )
        return self._stages[template, site][self.stages.index(stage) - 1]

    def shape(self, template: str, site: str, concept: str) -> tuple[str, ...]:
        """Per layer `monotone` where the trend is decided and every step holds, `reversed`, or nothing where neither is shown."""
        steps = [judged[concept] for judged in self._steps[template, site]]
        found = []
        for i, decision in enumerate(self.trends(template, site)[concept].decision):
            # NaN, where a step has no lower end, is not above anything.
            held = all(step.band.lower[i] > -self.settings.margin for step in steps)
            back = any(step.decision[i] == "amplified" for step in steps)
            found.append("reversed" if back else "monotone" if held and decision == "attenuated" else "")
        return tuple(found)

    @cached_property
    def _trends(self) -> _Judged:
        return self._judge("trend")

    @cached_property
    def _stages(self) -> _Judged:
        return self._judge("stage")

    @cached_property
    def _steps(self) -> _Judged:
        return self._judge("step")

    def _judge(self, kind: str) -> _Judged:
        """Every comparison of a kind is a family of its own, over its targets and layers."""
        s = self.settings
        draw: Any = {"margin": s.margin, "draws": s.draws, "seed": s.seed}
        judged: _Judged = {}
        for template in self.templates:
            for site in self.sites:
                of_role = [self.select(template, site, role) for role in ("target", "control")]
                for k in range(len(_contrasts(of_role[0][0], kind))):
                    targets, controls = ([_contrasts(c, kind)[k] for c in group] for group in of_role)
                    found = judge(targets, controls, specific_margin=s.specific_margin, **draw)
                    found = (*found, *(judge_controls(controls, **draw) if controls else ()))
                    judged.setdefault((template, site), []).append({j.name: j for j in found})
        return judged

    def to_frame(self) -> pd.DataFrame:
        """The rows of `lineage.csv`; a blank cell is NaN and has a flag that says why."""
        return self._frame.copy()

    @cached_property
    def _frame(self) -> pd.DataFrame:
        base, last, later = self.stages[0], self.stages[-1], self.stages[1:]
        kinds = {
            "trend": (self._trends, [(base, last)]),
            "stage": (self._stages, [(base, stage) for stage in later]),
            "step": (self._steps, list(pairwise(self.stages))),
        }
        rows = [
            row
            for (template, site) in self._trends
            for kind, (judged, ends) in kinds.items()
            for k, (start, end) in enumerate(ends)
            for c in self.select(template, site)
            for row in self._rows(
                c, _contrasts(c, kind)[k], judged[template, site][k][c.concept],
                {"comparison": kind, "from": start, "to": end},
            )
        ]  # fmt: skip
        frame = pd.DataFrame(rows, columns=LINEAGE_COLUMNS)
        frame["layer"] = frame["layer"].astype("Int64")
        return frame

    def _rows(
        self, c: TracedConcept, contrast: Contrast, j: Judgement, comparison: dict[str, str]
    ) -> Iterator[dict[str, Any]]:
        trend = comparison["comparison"] == "trend"
        shape = self.shape(c.template, c.site, c.concept) if trend else ("",) * len(c.layers)
        for i, layer in enumerate(c.layers):
            row: dict[str, Any] = {
                "concept": c.concept, "role": c.role, "template": c.template, "site": c.site, **comparison,
                "layer": layer, "depth": (layer + 1) / self.n_layers, "n_scenarios": len(c.units),
                **contrast.attenuation.cells("attenuation", i),
            }  # fmt: skip
            if c.role == "target":
                row |= j.specific.cells("specific", i)
            yield row | {
                "band_lower": j.band.lower[i], "band_upper": j.band.upper[i], "p_adjusted": j.p_adjusted[i],
                "decision": j.decision[i], "shape": shape[i], "flags": ";".join(dict.fromkeys((*j.flags[i], *self.flags))),
            }  # fmt: skip


TYPES = {cls.__name__: cls for cls in (LineageTrend, TracedConcept, Settings)}


def load_trend(path: str | Path) -> LineageTrend:
    """Load what `LineageTrend.save` wrote."""
    return load_record(path, TYPES)


def _contrasts(concept: TracedConcept, kind: str) -> tuple[Contrast, ...]:
    return {"trend": lambda: (concept.trend,), "stage": lambda: concept.stages, "step": lambda: concept.steps}[kind]()  # fmt: skip


# ---------------------------------------------------------------- measurement


def measure_lineage(
    lineage: Lineage | Mapping[str, Any],
    concepts: Concept | Sequence[Concept],
    controls: Concept | Sequence[Concept] = (),
    *,
    template: str = "both",
    layers: Sequence[int] | None = None,
    margin: float = 0.10,
    draws: int = 1000,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    store: str | None = None,
) -> LineageTrend:
    """Measure strength in every stage of a lineage, and whether it falls along them.

    The first and the last stage are held, the others are loaded one at a time.

    Args:
        lineage: from `load_lineage`, or names of stages with what `load_model` takes (or a loaded `Model`), base first.
        concepts: targets.
        controls: contrasts that have nothing to do with affect or stance; six or more for a decision on `specific`.
        template: raw, shared (the last stage's, for all) or both.
        layers: 0-based blocks; all by default.
        margin: δ of section 3.
        draws: multiplier draws behind every band.
        seed: of the draws.
        dtype, device: for all models.
        store: activation store; the default one if None.

    Raises:
        InputError: something cannot be measured, or a stage cannot be compared with the base.
    """
    stages = {s.name: s.model for s in lineage.stages} if isinstance(lineage, Lineage) else dict(lineage)
    if len(stages) < 2:
        raise InputError(
            f"the lineage has {len(stages)} stages, expected a base and at least one more; add it"
        )
    names = tuple(stages)
    ends = [_open(stages[name], dtype, device) for name in (names[0], names[-1])]
    pair = make_pair(ends[0], ends[1], allow_identical=True)
    design = design_study(pair, concepts, controls, template=template, layers=layers)
    between = {name: stages[name] for name in names[1:-1]}
    settings = Settings(margin=margin, draws=draws, seed=seed)
    return trace_design(design, settings, open_store(store), between, ends=(names[0], names[-1]))


def trace_design(
    design: Design,
    settings: Settings,
    store: Store,
    between: Mapping[str, Any],
    *,
    ends: tuple[str, str] = ("base", "final"),
) -> LineageTrend:
    """Trace a design's concepts through the stages between its two models; activations come from the store where they are.

    Args:
        design: of the base and the last stage.
        settings: margin, draws and seed.
        store: activation store.
        between: names of the stages between them, in order, with what `load_model` takes or a loaded model.
        ends: names of the design's own models.
    """
    if "own" in design.templates:
        raise InputError(
            "a lineage got the template 'own', expected the same prompts in every stage; use --template raw or shared"
        )
    base, final = design.pair.models
    kernels: dict[tuple[str, str, str], list[Float[np.ndarray, "layer n n"]]] = {}
    layers: dict[str, tuple[int, ...]] = {}
    described, weights = [], []
    for name, source in {ends[0]: base, **between, ends[1]: final}.items():
        model = source if source is base or source is final else _open(source, base.dtype, str(base.device))
        if model is not base:
            make_pair(base, model, allow_identical=True)
        for template in design.templates:
            for concept in design.concepts:
                prompts = design.prompts[concept.name, template][1]
                _check_same_prompts(model, concept, template, design)
                found = extract(
                    model, prompts, design.components, design.layers, store, label=f"{name} · {template} · {concept.name}"
                )  # fmt: skip
                for site, acts in found.items():
                    layers[site] = acts.layers
                    kernels.setdefault((concept.name, template, site), []).append(
                        stage_kernels(acts, concept.stimuli)
                    )
        described.append({"stage": name, "model": model.name, "revision": model.revision, "weights": model.weights})  # fmt: skip
        weights.append(model.weights)
        del model  # or the next stage is loaded beside this one
    same = (False, *(a == b for a, b in pairwise(weights)))
    traced = tuple(
        TracedConcept(
            concept.name, concept.role, template, site, layers[site], concept.stimuli.units,
            np.ascontiguousarray(kernels[concept.name, template, site], np.float32), same,
        )
        for template in design.templates
        for site in design.components
        for concept in design.concepts
    )  # fmt: skip
    provenance = {**describe_design(design), "stages": described}
    names = (ends[0], *between, ends[1])
    return LineageTrend(traced, names, base.n_layers, settings, design.flags, provenance)


def stage_kernels(acts: Activations, stimuli: StimulusSet) -> Float[np.ndarray, "layer n n"]:
    """The Gram matrices of one model, as the encode stage makes them; several categories are averaged."""
    rows = acts.normalised
    norms, shares = unit_norms(rows, stimuli), unit_shares(stimuli)
    found = [strength_kernels(contrast, norms, shares) for contrast in scenario_contrasts(rows, stimuli)]
    return np.mean(found, axis=0)


def _open(source: Any, dtype: str | None, device: str | None) -> Model:
    return source if isinstance(source, Model) else load_model(source, dtype=dtype, device=device)


def _check_same_prompts(model: Model, concept: Concept, template: str, design: Design) -> None:
    """Refuse a stage that would see other tokens than the others."""
    prompts = design.prompts[concept.name, template][1]
    check_prompts(model, prompts, concept.name)
    if template == "raw" and not any(model is known for known in design.pair.models):
        own = render(model.tokenizer, concept.stimuli, "raw", concept.speaker)
        different = [a.item for a, b in zip(own, prompts, strict=True) if a.ids != b.ids]
        if different:
            raise InputError(
                f"concept '{concept.name}', item '{different[0]}': stage '{model.name}' gives other token ids to the raw text than "
                f"'{design.pair.base.name}', expected identical ones; use --template shared"
            )
