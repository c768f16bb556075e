"""One verdict per concept: what encode, use and express say together, and what is missing where they do not.

A verdict (`verdicts`) other than `amplified` needs all three stages; a stage that was not run is `not_run`, and the row then
names what would settle the question instead of guessing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool

from empathy_probes.attenuation import Finding, Measurement
from empathy_probes.decisions import FEWEST_CONTROLS, Judgement
from empathy_probes.design import Settings
from empathy_probes.expression import Coupling
from empathy_probes.stitching import Stitching
from empathy_probes.verdicts import NOT_RUN, Encoded, Used, reach_verdict, use_word

LEDGER_COLUMNS = [
    "concept",
    "role",
    "mechanism",
    "dimension",
    "encode",
    "use",
    "express",
    "verdict",
    "onset_lower",
    "onset_upper",
    "size",
    "size_lower",
    "size_upper",
    "missing",
    "scenarios_needed",
]


@dataclass(frozen=True)
class Headline:
    """What the encode stage says about one concept, under one template at one site."""

    concept: str
    role: str
    template: str
    site: str
    decision: str
    """attenuated, amplified, equivalent, inconclusive; empty where nothing is decided."""
    quantity: str
    """`specific` (beyond the controls) or `attenuation`."""
    layer: int | None
    """Where the size is quoted: the largest change among the decided layers, else among all."""
    size: float | None
    size_lower: float | None
    """Simultaneous 95 % band at that layer."""
    size_upper: float | None
    onset_lower: int | None
    onset_upper: int | None
    peak_lower: int | None
    peak_upper: int | None
    n_scenarios: int
    n_controls: int
    """Controls whose contrast both models carry at that layer; the most at any layer where nothing is decided."""
    minimum_detectable: float | None
    """Smallest attenuation that this study would have decided with 80 % power at that layer."""
    scenarios_needed: int | None
    controls_needed: int | None
    flags: tuple[str, ...]
    sentence: str


def headlines(finding: Finding) -> tuple[Headline, ...]:
    """One headline per target, template and site."""
    found = []
    for template in finding.templates:
        for site in finding.sites:
            judgements = finding.judgements(template, site)
            for m in finding.select(template, site, "target"):
                found.append(_headline(finding, m, judgements[m.concept]))
    return tuple(found)


def headline_template(finding: Finding) -> str:
    """`shared` where it was measured, else the first template: the one a single row per concept speaks of."""
    return "shared" if "shared" in finding.templates else finding.templates[0]


def ledger_frame(
    finding: Finding, coupling: Coupling | None = None, stitching: Stitching | None = None, gain: Any = None
) -> pd.DataFrame:
    """The rows of `ledger.csv`, one per concept, controls last.

    Args:
        finding: the encode stage.
        coupling: the express stage; None where it was not run.
        stitching: the use stage.
        gain: dose-response of the use stage: anything with `decision(concept, template)`.
    """
    template, site = headline_template(finding), finding.sites[0]
    by_concept = {h.concept: h for h in headlines(finding) if (h.template, h.site) == (template, site)}
    expressed = {c.concept: c for c in coupling.select(template)} if coupling else {}
    stitched = {c.concept: c for c in stitching.concepts if c.template == template} if stitching else {}
    rows = []
    for m in finding.select(template, site):
        described = finding.provenance["concepts"][m.concept]
        row: dict[str, Any] = {"concept": m.concept, "role": m.role}
        row |= {"mechanism": described["mechanism"], "dimension": described["dimension"]}
        used, express = None, None
        if stitching and m.concept in stitched:
            decided = gain.decision(m.concept, template) if gain is not None else None
            used = Used(stitching.loss(stitched[m.concept]), decided)
        if coupling and m.concept in expressed:
            express = coupling.decision(expressed[m.concept])
        row |= {
            "use": use_word(used, finding.n_layers),
            "express": NOT_RUN if express is None else express or "undecided",
        }
        if m.role == "target":
            h = by_concept[m.concept]
            verdict = reach_verdict(_encoded(finding, m, h), used, express, finding.n_layers)
            row |= {"encode": h.decision or "undecided", "verdict": verdict.word}
            row |= {
                key: getattr(h, key)
                for key in ("onset_lower", "onset_upper", "size", "size_lower", "size_upper")
            }
            row |= {"missing": ";".join(verdict.missing), "scenarios_needed": h.scenarios_needed}
        else:
            decision, _ = encoded_overall(finding.judgements(template, site)[m.concept])
            row |= {"encode": decision or "undecided", "verdict": ""}
        rows.append(row)
    frame = pd.DataFrame(rows, columns=LEDGER_COLUMNS)
    for column in ("onset_lower", "onset_upper", "scenarios_needed"):
        frame[column] = frame[column].astype("Int64")
    return frame


def _encoded(finding: Finding, m: Measurement, h: Headline) -> Encoded:
    """What the encode stage says, reduced to what a verdict needs."""
    margin = finding.settings.margin
    blocks = np.array([layer >= 0 for layer in m.layers])
    alone = m.contrast.attenuation
    drifted = ((alone.lower > margin) | (alone.upper < -margin)) & blocks
    return Encoded(
        h.decision, h.quantity == "specific", h.onset_lower, bool(h.quantity == "specific" and drifted.any()),
        bool((m.transfer_fails(mapped=False) & ~m.transfer_fails(mapped=True) & blocks).any()),
        "controls" if {"few_controls", "no_controls"} & set(h.flags) else "scenarios",
    )  # fmt: skip


def headline_dicts(found: Sequence[Headline]) -> list[dict[str, Any]]:
    """Plain data for the manifest."""
    return [{**asdict(h), "flags": list(h.flags)} for h in found]


def encoded_overall(j: Judgement) -> tuple[str, int | None]:
    """The encode stage in one word over all blocks, and the index of the layer it is quoted at (None where all are blank)."""
    blocks = np.array([layer >= 0 for layer in j.layers])
    known = blocks & ~np.isnan(j.band.lower)
    decided = np.array([d in ("attenuated", "amplified") for d in j.decision]) & blocks
    candidates = decided if decided.any() else known
    if not candidates.any():
        return "", None
    # Where only "at least so much" is known, the lower end of the band stands for the size.
    size = np.abs(np.where(np.isnan(j.band.value), j.band.lower, j.band.value))
    at = int(np.argmax(np.where(candidates, size, -np.inf)))
    if decided.any():
        return j.decision[at], at
    # Where neither model shows the contrast there is nothing to lose or to gain, and nothing to be shown equal.
    asked = {d for d, there in zip(j.decision, blocks & carried(j), strict=True) if there}
    if asked == {"equivalent"}:
        # Quoted where it is equivalent relative to controls, if anywhere: a layer that few of them reach says less.
        judged = known & np.array([quantity == "specific" for quantity in j.headline])
        return "equivalent", int(np.argmax(np.where(judged, size, -np.inf))) if judged.any() else at
    return ("inconclusive" if asked & {"inconclusive", "equivalent"} else ""), at


def carried(j: Judgement) -> Bool[np.ndarray, " layer"]:
    """Layers at which at least one of the models shows the contrast."""
    return np.array(["base_not_detected" not in flags or "only_in_aligned" in flags for flags in j.flags])


def _headline(finding: Finding, m: Measurement, j: Judgement) -> Headline:
    decision, at = encoded_overall(j)
    blank = at is None
    index = 0 if at is None else at
    of_blocks = [i for i, layer in enumerate(m.layers) if layer >= 0]
    flags = {flag for i in of_blocks if blank or i == at for flag in j.flags[i]}
    if (
        blank
        and "base_not_detected" in flags
        and not all("base_not_detected" in j.flags[i] for i in of_blocks)
    ):
        flags = flags - {"base_not_detected"} | {"open_band"}
    flags |= {f for f in finding.flags}
    headline = Headline(
        concept=m.concept,
        role=m.role,
        template=m.template,
        site=m.site,
        decision=decision,
        quantity=j.headline[index],
        layer=None if blank else m.layers[index],
        size=None if blank else _number(j.band.value[index]),
        size_lower=None if blank else _number(j.band.lower[index]),
        size_upper=None if blank else _number(j.band.upper[index]),
        onset_lower=j.onset.lower if decision == "attenuated" else None,
        onset_upper=j.onset.upper if decision == "attenuated" else None,
        peak_lower=j.peak.lower if decision == "attenuated" else None,
        peak_upper=j.peak.upper if decision == "attenuated" else None,
        n_scenarios=len(m.units),
        n_controls=int(j.n_controls[index] if decision else j.n_controls[np.array(m.layers) >= 0].max()),
        minimum_detectable=None if blank else _number(j.minimum_detectable[index]),
        scenarios_needed=None if blank else _count(j.scenarios_needed[index]),
        controls_needed=None if blank else _count(j.controls_needed[index]),
        flags=tuple(sorted(flags)),
        sentence="",
    )
    shown = [i for i in of_blocks if carried(j)[i]]
    alone = [i for i in shown if j.headline[i] != headline.quantity]
    if decision == "equivalent" and alone:
        headline = replace(headline, flags=tuple(sorted({*headline.flags, "equivalent_alone"})))
    named = None if len(shown) == len(of_blocks) and not alone else [i for i in shown if i not in alone]
    layers = [None if at is None else [m.layers[i] for i in at] for at in (named, alone)]
    return replace(headline, sentence=_sentence(headline, finding.settings, layers[0], layers[1] or []))


def runs_of(layers: Sequence[int]) -> list[list[int]]:
    """Ascending layers cut into runs of neighbours.

    >>> runs_of([1, 2, 3, 5])
    [[1, 2, 3], [5]]
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _count(value: float) -> int | None:
    return int(np.ceil(value)) if np.isfinite(value) else None


def percent(value: float | None) -> str:
    """A share as a percentage with a true minus sign; an en dash where there is none.

    >>> percent(-0.123)
    '−12 %'
    """
    if value is None:
        return "–"
    rounded = round(100 * value)
    return f"{'−' if rounded < 0 else ''}{abs(rounded)} %"


def layer_name(layer: Any) -> str:
    """`block 3`, or the embedding."""
    return "the embedding" if int(layer) < 0 else f"block {int(layer)}"


def _named(layers: Sequence[int]) -> str:
    """Layers in words: 0, 2–5."""
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs_of(layers))


def _sentence(h: Headline, settings: Settings, shown: Sequence[int] | None, alone: Sequence[int]) -> str:
    """The headline in words.

    Args:
        h: without its sentence.
        settings: margins.
        shown: the blocks that carry the contrast and are judged as the quoted one is; None where all are.
        alone: the others that carry it, which too few controls reach.
    """
    few = f"fewer than {FEWEST_CONTROLS}" if "few_controls" in h.flags else "no"
    against = (
        f"relative to {h.n_controls} controls"
        if h.quantity == "specific"
        else f"({few} controls to compare with)"
    )
    band = f"simultaneous 95 % band {percent(h.size_lower)} to {percent(h.size_upper)}, n = {h.n_scenarios} scenarios"
    size = percent(h.size) if h.size is not None else f"at least {percent(h.size_lower)}"
    if h.layer is None:
        if "base_not_detected" in h.flags:
            return f"Nothing can be said: the base does not carry this contrast beyond noise at any block (n = {h.n_scenarios})."
        return (
            "Nothing can be said: the base carries this contrast at some blocks, but too weakly for a band over all layers and "
            f"targets (n = {h.n_scenarios})."
            if "open_band" in h.flags
            else f"Nothing can be said: no block has a usable comparison (n = {h.n_scenarios})."
        )
    if h.decision == "attenuated":
        where = f"Attenuated by {layer_name(h.onset_upper)}" if h.onset_upper is not None else "Attenuated"
        if h.onset_lower is not None and h.onset_lower != h.onset_upper:
            where += f"; could begin as early as {layer_name(h.onset_lower)}"
        peak = (
            f" (it may be any from {layer_name(h.peak_lower)} to {layer_name(h.peak_upper)})"
            if h.peak_lower != h.peak_upper
            else ""
        )
        return f"{where}. Largest at block {h.layer}{peak}: {size} {against} ({band})."
    if h.decision == "amplified":
        return f"Amplified at block {h.layer}: attenuation {size} {against} ({band})."
    if h.decision == "equivalent":
        margin = settings.specific_margin if h.quantity == "specific" else settings.margin
        where = f" that shows the contrast ({_named(shown)})" if shown else ""
        rest = (
            f" By itself within ±{percent(settings.margin)} at block {_named(alone)}, which fewer than {FEWEST_CONTROLS} controls reach."
            if alone
            else ""
        )
        return f"No change beyond ±{percent(margin)} {against} at any block{where}; the largest is {size} at block {h.layer} ({band}).{rest}"
    if h.decision == "":
        return (
            f"Not decided: at most {h.n_controls} usable controls at any block, at least {FEWEST_CONTROLS} are needed. "
            f"Largest at block {h.layer}: attenuation {size} ({band})."
        )
    found = []
    if h.minimum_detectable is not None:
        least = (
            f"an attenuation of {percent(h.minimum_detectable)}"
            if h.minimum_detectable < 1
            else "no attenuation"
        )
        found.append(f"{least} is found in four of five such runs")
    needs = [f"{h.scenarios_needed} scenarios"] if h.scenarios_needed is not None else []
    needs += [f"{h.controls_needed} controls"] if h.controls_needed is not None else []
    if needs:
        found.append(f"about {' and '.join(needs)} would settle it")
    tail = f"; {'; '.join(found)}" if found else ""
    return f"Inconclusive: {size} at block {h.layer} {against} ({band}){tail}."
