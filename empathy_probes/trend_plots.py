"""Figures of a lineage: what every stage has lost, layer by layer, and the trend over stages, from the columns of lineage.csv."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from empathy_probes.drawing import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    Line,
    Panel,
    Sheet,
    draw_sheet,
    plotly_sheet,
)
from empathy_probes.errors import InputError

COLOURS = (SKY, ORANGE, BLUE, VERMILLION, PURPLE, GREEN)


def trend_figure(
    frame: pd.DataFrame, concept: str | None = None, template: str | None = None, margin: float = 0.10
) -> Figure:
    """Attenuation of one concept at every stage against the base, and of the later stages against the earlier ones.

    Args:
        frame: columns of lineage.csv.
        concept: which concept; the first by default.
        template: which template; `shared` where it is there, else the first.
        margin: δ.

    Raises:
        InputError: the frame has no such rows.
    """
    return draw_sheet(_sheet(frame, concept, template, margin))


def trend_plotly(
    frame: pd.DataFrame, concept: str | None = None, template: str | None = None, margin: float = 0.10
) -> Any:
    """The same as a plotly figure."""
    return plotly_sheet(_sheet(frame, concept, template, margin))


def _sheet(frame: pd.DataFrame, concept: str | None, template: str | None, margin: float) -> Sheet:
    known = list(frame["template"].unique())
    chosen = template or ("shared" if "shared" in known else known[0])
    name = concept or str(frame["concept"].iloc[0])
    rows = frame[(frame["template"] == chosen) & (frame["concept"] == name)]
    if rows.empty:
        raise InputError(
            f"no lineage rows for concept {name!r} under template {chosen!r}, expected some of "
            f"{', '.join(sorted(frame['concept'].unique()))}; choose among those"
        )
    rows = rows[rows["site"] == rows["site"].iloc[0]]
    stages = rows[rows["comparison"] == "stage"]
    trend = rows[rows["comparison"] == "trend"].sort_values("layer")
    order = list(dict.fromkeys(stages["to"]))
    lines = tuple(
        _line(stages[stages["to"] == stage].sort_values("layer"), "attenuation", stage, COLOURS[k % len(COLOURS)])
        for k, stage in enumerate(order)
    )  # fmt: skip
    about_specific = bool(trend["specific"].notna().any()) and not _has(trend, "few_controls").all()
    quantity = "specific" if about_specific else "attenuation"
    tested = Line(
        f"{quantity} (95 % band over layers)", _column(trend, quantity), _column(trend, "band_lower"),
        _column(trend, "band_upper"), GREEN if about_specific else BLACK,
    )  # fmt: skip
    marks = (
        (0.0, "", GREY, "solid"),
        (margin, f"margin ±{margin:g}", GREY, "dot"),
        (-margin, "", GREY, "dot"),
    )
    unit = "attenuation\n(1 = gone)"
    early_late = (
        f"Trend: what later stages keep less than earlier ones ({stages['from'].iloc[0]} → {order[-1]})"
    )
    panels = (
        Panel("What each stage has lost against the base (pointwise 95 %)", unit, lines, marks, None, _limits(lines)),
        Panel(early_late, f"{quantity}\n(1 = gone)", (tested,), marks, None, _limits((tested,))),
    )  # fmt: skip
    n = int(trend["n_scenarios"].max())
    caption = f"lineage · {name} · {chosen} · n = {n} scenarios"
    return Sheet(caption, trend["layer"].to_numpy(dtype=float), trend["depth"].to_numpy(dtype=float), panels)


def _has(rows: pd.DataFrame, flag: str) -> Any:
    return rows["flags"].astype(str).str.contains(rf"\b{flag}\b")


def _column(rows: pd.DataFrame, name: str) -> Any:
    return rows[name].to_numpy(dtype=float, na_value=np.nan)


def _line(rows: pd.DataFrame, column: str, name: str, colour: str) -> Line:
    value, lower, upper = (_column(rows, f"{column}{end}") for end in ("", "_lower", "_upper"))
    return Line(name, value, lower, upper, colour)


def _limits(lines: tuple[Line, ...]) -> tuple[float, float]:
    """Room for all that is drawn; one noisy amplified layer can reach −5, and is cut."""
    ends = np.concatenate([x for line in lines for x in (line.y, line.lower, line.upper) if x is not None])
    ends = ends[np.isfinite(ends)]
    return max(float(ends.min(initial=-0.3)) - 0.08, -1.2), min(float(ends.max(initial=0.3)) + 0.08, 1.05)
