"""One row per mechanism and per dimension: what alignment did to their concepts on the whole.

A concept's log keep is averaged over the blocks at which both models carry it (their errors are shared scenario by scenario, so
the average's error is that of the averaged influence). The concepts of a group are a sample, as the controls are: their mean is
a random-effects one with Hartung and Knapp's variance, and `specific` is its distance to the controls' mean of the same kind,
with Satterthwaite's degrees of freedom. No layer is chosen, so nothing is picked for being large.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from empathy_probes.attenuation import Finding, Measurement
from empathy_probes.contrasts import Contrast
from empathy_probes.controls import LEAST, pool_controls
from empathy_probes.decisions import FEWEST_CONTROLS
from empathy_probes.stats import critical_t

SUMMARY_COLUMNS = [
    "kind", "group", "template", "site", "n_concepts", "n_used", "attenuation", "attenuation_lower", "attenuation_upper",
    "specific", "specific_lower", "specific_upper", "flags",
]  # fmt: skip
KINDS = ("mechanism", "dimension")


@dataclass(frozen=True)
class Mean:
    """A random-effects mean of log keeps."""

    value: float
    variance: float
    """NaN with a single concept: nothing tells then how much concepts differ."""
    count: int
    errors: Mapping[str, float]
    """Error of the value per scenario; the squares sum to its sampling variance."""


def summary_frame(finding: Finding) -> pd.DataFrame:
    """The rows of `summary.csv`: one per mechanism and dimension, template and site; empty where concepts have neither."""
    rows = []
    for template in finding.templates:
        for site in finding.sites:
            controls = _mean([m.contrast for m in finding.select(template, site, "control")])
            targets = finding.select(template, site, "target")
            for kind in KINDS:
                for group in sorted({_group(finding, m, kind) for m in targets} - {""}):
                    own = [m.contrast for m in targets if _group(finding, m, kind) == group]
                    rows.append(
                        {
                            "kind": kind,
                            "group": group,
                            "template": template,
                            "site": site,
                            **_row(own, controls),
                        }
                    )
    return pd.DataFrame(rows, columns=SUMMARY_COLUMNS)


def _group(finding: Finding, m: Measurement, kind: str) -> str:
    return str(finding.provenance["concepts"][m.concept][kind])


def _row(targets: Sequence[Contrast], controls: Mean) -> dict[str, Any]:
    mean = _mean(targets)
    row: dict[str, Any] = {"n_concepts": len(targets), "n_used": mean.count}
    flags = [] if mean.count else ["base_not_detected"]
    flags += ["single_concept"] if mean.count == 1 else []
    row |= _interval("attenuation", mean.value, mean.variance, mean.count - 1.0)
    if controls.count >= FEWEST_CONTROLS:
        both = mean.variance + controls.variance
        shared = sum(error * controls.errors.get(key, 0.0) for key, error in mean.errors.items())
        scatter = mean.variance**2 / max(mean.count - 1, 1) + controls.variance**2 / (controls.count - 1)
        degrees = both**2 / scatter if scatter > 0 else float(controls.count - 1)
        row |= _interval(
            "specific", mean.value - controls.value, max(both - 2 * shared, LEAST * both), degrees
        )
    else:
        flags.append("few_controls" if controls.count else "no_controls")
    return {**row, "flags": ";".join(flags)}


def _interval(name: str, log_keep: float, variance: float, degrees: float) -> dict[str, float]:
    """1 − exp(log keep) with its ends; a missing variance leaves them blank."""
    known = np.isfinite(variance) and degrees > 0
    reach = float(critical_t(np.asarray(degrees))) * np.sqrt(variance) if known else np.nan
    return {
        name: 1 - np.exp(log_keep), f"{name}_lower": 1 - np.exp(log_keep + reach), f"{name}_upper": 1 - np.exp(log_keep - reach),
    }  # fmt: skip


def _mean(contrasts: Sequence[Contrast]) -> Mean:
    averages = [average for c in contrasts if (average := _average(c)) is not None]
    if not averages:
        return Mean(np.nan, np.nan, 0, {})
    values = np.array([[value] for value, _ in averages])
    keys = sorted({key for _, errors in averages for key in errors})
    errors = np.array([[errors.get(key, 0.0) for key in keys] for _, errors in averages])
    # Concepts asked of the same scenarios err together.
    shared = (errors @ errors.T)[..., None]
    pool = pool_controls(values, (errors**2).sum(1)[:, None], np.ones_like(values, dtype=bool), shared)
    variance = float(pool.variance[0]) if len(values) > 1 else np.nan
    of_mean = dict(zip(keys, (pool.weights[:, 0] @ errors).tolist(), strict=True))
    return Mean(float(pool.mean[0]), variance, len(values), of_mean)


def _average(c: Contrast) -> tuple[float, dict[str, float]] | None:
    """A concept's log keep over its usable blocks, and its error per scenario; None where no block is usable."""
    usable = c.has_form("log", "identical") & (np.array(c.layers) >= 0)
    if not usable.any():
        return None
    influence = c.influence[usable].mean(0)
    errors = influence / np.sqrt(c.n * (c.n - 1))
    return float(c.theta[usable].mean()), dict(zip(c.keys, errors.tolist(), strict=True))
