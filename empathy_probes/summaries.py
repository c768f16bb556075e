"""One row per mechanism and per dimension: what alignment did to their concepts on the whole.

A concept's log keep is averaged over the blocks at which the base carries it (their errors are shared scenario by scenario, so
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
from empathy_probes.controls import LEAST, nearest_to_no_change, pool_controls
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
    at_least: bool
    """A concept is lost at some block: no more than what it has lost at least is in the value."""
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
    flags += ["at_least"] if mean.at_least else []
    row |= _interval("attenuation", mean.value, mean.variance, mean.count - 1.0, mean.at_least)
    flags += ["control_lost"] if controls.at_least else []
    if controls.count >= FEWEST_CONTROLS:
        both = mean.variance + controls.variance
        shared = sum(error * controls.errors.get(key, 0.0) for key, error in mean.errors.items())
        scatter = mean.variance**2 / max(mean.count - 1, 1) + controls.variance**2 / (controls.count - 1)
        degrees = both**2 / scatter if scatter > 0 else float(controls.count - 1)
        row |= _interval(
            "specific",
            mean.value - controls.value,
            max(both - 2 * shared, LEAST * both),
            degrees,
            mean.at_least,
        )
    else:
        flags.append("few_controls" if controls.count else "no_controls")
    return {**row, "flags": ";".join(flags)}


def _interval(
    name: str, log_keep: float, variance: float, degrees: float, at_least: bool
) -> dict[str, float]:
    """1 − exp(log keep) with its ends; a missing variance leaves them blank, and of what is lost there is a bound only."""
    known = np.isfinite(variance) and degrees > 0
    reach = float(critical_t(np.asarray(degrees))) * np.sqrt(variance) if known else np.nan
    value, lower, upper = 1 - np.exp(log_keep), 1 - np.exp(log_keep + reach), 1 - np.exp(log_keep - reach)
    if at_least:
        value, upper = np.nan, 1.0 if known else np.nan
    return {
        name: value, f"{name}_lower": lower, f"{name}_upper": upper,
    }  # fmt: skip


def _mean(contrasts: Sequence[Contrast]) -> Mean:
    averages = [average for c in contrasts if (average := _average(c)) is not None]
    if not averages:
        return Mean(np.nan, np.nan, 0, False, {})
    values = np.array([[average.value] for average in averages])
    keys = sorted({key for average in averages for key in average.errors})
    errors = np.array([[average.errors.get(key, 0.0) for key in keys] for average in averages])
    # Concepts asked of the same scenarios err together.
    shared = (errors @ errors.T)[..., None]
    pool = pool_controls(values, (errors**2).sum(1)[:, None], np.ones_like(values, dtype=bool), shared)
    variance = float(pool.variance[0]) if len(values) > 1 else np.nan
    of_mean = dict(zip(keys, (pool.weights[:, 0] @ errors).tolist(), strict=True))
    lost = any(average.at_least for average in averages)
    return Mean(float(pool.mean[0]), variance, len(values), lost, of_mean)


@dataclass(frozen=True)
class _Average:
    """A concept's log keep over the blocks at which the base carries it."""

    value: float
    errors: Mapping[str, float]
    at_least: bool


def _average(c: Contrast) -> _Average | None:
    """None where the base carries nothing.

    Blocks at which the aligned model's signal is weak count: an average over those that survived would say that nothing is lost. Where
    only a bound is known, the end of the set nearest to no change is taken, as for controls.
    """
    carried = ~c.has_form("blank") & (np.array(c.layers) >= 0)
    if not carried.any():
        return None
    open_ = carried & np.isnan(c.theta)
    theta = np.where(open_, nearest_to_no_change(c), c.theta)
    # That end is beyond its error already, and near 0 the logarithm has no derivative.
    influence = np.where(open_[:, None], 0.0, c.influence)
    errors = influence[carried].mean(0) / np.sqrt(c.n * (c.n - 1))
    keyed = dict(zip(c.keys, errors.tolist(), strict=True))
    return _Average(float(theta[carried].mean()), keyed, bool(open_.any()))
