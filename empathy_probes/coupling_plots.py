"""Figures of what reaches the output: how far each concept moves the answer, from the columns of coupling.csv."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from empathy_probes.drawing import (
    BLUE,
    GREEN,
    GREY,
    VERMILLION,
    Panel,
    Sheet,
    draw_sheet,
    line_of,
    plotly_sheet,
)


def coupling_figure(frame: pd.DataFrame, template: str | None = None) -> Figure:
    """Coupling of every concept in both models, and how much of it is lost.

    Args:
        frame: columns of coupling.csv.
        template: which template; `shared` where it is there, else the first.
    """
    return draw_sheet(_sheet(frame, template))


def coupling_plotly(frame: pd.DataFrame, template: str | None = None) -> Any:
    """The same as a plotly figure."""
    return plotly_sheet(_sheet(frame, template))


def _sheet(frame: pd.DataFrame, template: str | None) -> Sheet:
    known = list(frame["template"].unique())
    chosen = template or ("shared" if "shared" in known else known[0])
    rows = frame[frame["template"] == chosen]
    # Worst targets first, then the controls.
    shown = rows.assign(
        control=rows["role"] == "control", much=rows["specific"].fillna(rows["attenuation"]).fillna(-9)
    )
    rows = shown.sort_values(["control", "much"], ascending=[True, False])
    places = np.arange(len(rows), dtype=float)
    models = (line_of(rows, "base", "base", BLUE), line_of(rows, "aligned", "aligned", VERMILLION))
    lost = [line_of(rows, "attenuation", "attenuation", GREY)]
    if rows["specific"].notna().any():
        lost.append(line_of(rows, "specific", "beyond the controls", GREEN))
    # One concept that says next to nothing can reach −5 and flatten all others.
    ends = np.concatenate([x for line in lost for x in (line.y, line.lower, line.upper) if x is not None])
    ends = ends[np.isfinite(ends)]
    limits = (max(ends.min(initial=-0.2) - 0.05, -1.2), min(ends.max(initial=1.0) + 0.05, 2.2))
    panels = (
        Panel("How far the concept moves the answer (95 %)", "coupling\n(nats)", models, ((0.0, "", GREY, "solid"),), None, None, True),
        Panel("How much of that is lost (95 %)", "attenuation\n(1 = gone)", tuple(lost), ((0.0, "", GREY, "solid"),), None, limits, True),
    )  # fmt: skip
    n = sorted({int(v) for v in rows["n_scenarios"]})
    counted = f"n = {n[0]}" if len(n) == 1 else f"n = {n[0]} to {n[-1]}"
    names = tuple(f"{r.concept}{' (control)' if r.role == 'control' else ''}" for r in rows.itertuples())
    return Sheet(f"coupling · {chosen} · {counted} scenarios", places, places, panels, names, "concept")
