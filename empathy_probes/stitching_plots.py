"""Figures of stitching: two curves of coupling over the cut, and the shares of every block, from the columns of stitching.csv."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from empathy_probes.drawing import (
    BLUE,
    GREY,
    PURPLE,
    VERMILLION,
    Line,
    Panel,
    Sheet,
    draw_sheet,
    line_of,
    plotly_sheet,
)
from empathy_probes.errors import InputError

ORDERS = {"aligned_then_base": ("aligned → base", VERMILLION), "base_then_aligned": ("base → aligned", BLUE)}


def stitching_figure(frame: pd.DataFrame, concept: str | None = None, template: str | None = None) -> Figure:
    """Coupling of every hybrid of one concept, and what each block takes from it.

    Args:
        frame: columns of stitching.csv.
        concept: which concept; the first by default.
        template: which template; `shared` where it is there, else the first.

    Raises:
        InputError: the frame has no such rows.
    """
    return draw_sheet(_sheet(frame, concept, template))


def stitching_plotly(frame: pd.DataFrame, concept: str | None = None, template: str | None = None) -> Any:
    """The same as a plotly figure."""
    return plotly_sheet(_sheet(frame, concept, template))


def _sheet(frame: pd.DataFrame, concept: str | None, template: str | None) -> Sheet:
    known = list(frame["template"].unique())
    chosen = template or ("shared" if "shared" in known else known[0])
    name = concept or str(frame["concept"].iloc[0])
    rows = frame[(frame["template"] == chosen) & (frame["concept"] == name)]
    if rows.empty:
        raise InputError(
            f"no stitching rows for concept {name!r} under template {chosen!r}, expected some of "
            f"{', '.join(sorted(frame['concept'].unique()))}; choose among those"
        )
    boundaries = list(dict.fromkeys(rows["boundary"].astype(str)))
    places = np.arange(len(boundaries), dtype=float)
    orders = {order: rows[rows["order"] == order] for order in ORDERS}
    curves = tuple(_line(orders[order], "coupling", *ORDERS[order]) for order in ORDERS)
    shares = tuple(_line(orders[order], "share", *ORDERS[order]) for order in ORDERS)
    base, aligned = (orders["aligned_then_base"]["coupling"].to_numpy(dtype=float)[i] for i in (0, -1))
    marks = (
        (float(base), f"base alone {base:.2f}", GREY, "dash"),
        (float(aligned), f"aligned alone {aligned:.2f}", PURPLE, "dot"),
        (0.0, "", GREY, "solid"),
    )
    loss = base - aligned
    panels = (
        Panel("What the hybrid expresses, cut after … (95 %)", "coupling\n(nats)", curves, marks),
        Panel(
            f"What each block takes of the {loss:.2f} nats lost (95 %)", "share\n(nats)", shares, ((0.0, "", GREY, "solid"),),
            None, None, True,
        ),
    )  # fmt: skip
    strange = rows["flags"].astype(str).str.contains("insane_boundary").any()
    n = frame.attrs.get("n_scenarios", {}).get(name)
    counted = f" · n = {n} scenarios" if n else ""
    caption = f"stitching · {name} · {chosen}{counted}" + (
        " · blanks: no language model at that cut" if strange else ""
    )
    return Sheet(
        caption,
        places,
        places,
        panels,
        tuple(_named(b) for b in boundaries),
        "cut after block (emb = embedding)",
    )


def _named(boundary: str) -> str:
    return {"none": "none", "-1": "emb", "all": "head"}.get(boundary, boundary)


def _line(rows: pd.DataFrame, column: str, name: str, colour: str) -> Line:
    if column == "coupling":
        insane = rows["flags"].astype(str).str.contains("insane_boundary").to_numpy()
        rows = rows.assign(
            **{f"{column}{end}": rows[f"{column}{end}"].mask(insane) for end in ("", "_lower", "_upper")}
        )
    return line_of(rows, column, name, colour)
