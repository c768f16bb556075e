"""Figures of attribution: what each block's attention and MLP write of a concept, and the heads that differ most.

All from the columns of attribution.csv. A write is in units of the stream's rms where the score is read; 0 is the floor of every
panel, and the writes of base or aligned sum to that model's total, which the caption names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from empathy_probes.drawing import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILLION,
    Line,
    Panel,
    Sheet,
    draw_sheet,
    plotly_sheet,
    settings,
)
from empathy_probes.errors import InputError
from empathy_probes.wording import interval, number, split_flags

SIDES = (("base", BLUE), ("aligned", VERMILLION))
UNIT = "write (rms)"
Count = Mapping[str, int] | None
"""Scenarios behind each concept; by default what the result's own table carries."""
DASH = {"base": "solid", "aligned": "dash"}


def attribution_figure(
    frame: pd.DataFrame, concept: str | None = None, template: str | None = None, *, n_scenarios: Count = None
) -> Figure:
    """What attention and MLP of every block write along one concept's direction, and how the two models differ.

    Args:
        frame: columns of attribution.csv.
        concept: which; the first by default.
        template: which; the concept's first by default.
        n_scenarios: behind each concept, where the frame does not carry it.

    Raises:
        InputError: the frame has no such rows.
    """
    return draw_sheet(_sheet(*_chosen(frame, concept, template, n_scenarios), frame.attrs.get("n_layers")))


def attribution_plotly(
    frame: pd.DataFrame, concept: str | None = None, template: str | None = None, *, n_scenarios: Count = None
) -> Any:
    """The same as `attribution_figure`, as a plotly figure."""
    return plotly_sheet(_sheet(*_chosen(frame, concept, template, n_scenarios), frame.attrs.get("n_layers")))


def heads_figure(
    frame: pd.DataFrame, concept: str | None = None, template: str | None = None, *, top: int = 10,
    n_scenarios: Count = None,
) -> Figure:  # fmt: skip
    """The attention heads whose writes differ most between the models; arguments as in `attribution_figure`.

    A filled mark lies beyond the band that holds for all components at once; a hollow one does not.
    """
    rows, caption = _chosen(frame, concept, template, n_scenarios)
    ranked = _ranked_heads(rows, top)
    with settings():
        figure = Figure(figsize=(7.2, 1.75 + 0.3 * len(ranked)), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        names = [f"L{layer} H{head}" for layer, head in ranked.index]
        for shift, (side, colour) in zip((-0.14, 0.14), SIDES, strict=True):
            _forest(left, ranked, side, colour, shift)
        _forest(right, ranked, "difference", BLACK, 0.0)
        for axes, title in ((left, "What they write"), (right, "aligned − base")):
            axes.axvline(0, color=GREY, linewidth=1.0)
            axes.set_title(title)
            axes.set_xlabel("write (rms of stream), 95 %")
            axes.grid(axis="x", color="#e5e7eb", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.tick_params(axis="y", length=0)
            axes.locator_params(axis="x", nbins=5)
        left.set_yticks(range(len(names)), names)
        left.set_ylim(len(names) - 0.5, -0.5)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=2)
        figure.text(0.99, 0.015, "filled: beyond the simultaneous band", ha="right", fontsize=9.5, color=GREY)
        figure.suptitle(caption, x=0.01, ha="left", fontsize=11, color=GREY)
    return figure


def heads_plotly(
    frame: pd.DataFrame, concept: str | None = None, template: str | None = None, *, top: int = 10,
    n_scenarios: Count = None,
) -> Any:  # fmt: skip
    """The same as `heads_figure`, as a plotly figure."""
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    rows, _ = _chosen(frame, concept, template, n_scenarios)
    ranked = _ranked_heads(rows, top)
    names = [f"L{layer} H{head}" for layer, head in ranked.index]
    figure = make_subplots(
        rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.06,
        subplot_titles=["<b>What they write</b>", "<b>aligned − base</b>"],
    )  # fmt: skip
    for column, side, colour in ((1, *SIDES[0]), (1, *SIDES[1]), (2, "difference", BLACK)):
        value, lower, upper, clear = _places(ranked, side)
        hover = [
            f"<b>{name}</b> {side}<br>{number(v, 3)} {interval(a, b, 3)}"
            for name, v, a, b in zip(names, value, lower, upper, strict=True)
        ]
        bars = {
            "array": (upper - value).tolist(),
            "arrayminus": (value - lower).tolist(),
            "thickness": 1.2,
            "width": 0,
        }
        shape = ["circle" if c else "circle-open" for c in clear]
        figure.add_trace(
            go.Scatter(
                x=value.tolist(), y=names, mode="markers", name=side, hovertext=hover, hoverinfo="text",
                marker={"color": colour, "size": 8, "symbol": shape}, error_x=bars, showlegend=column == 1,
            ),
            row=1, col=column,
        )  # fmt: skip
    figure.update_yaxes(autorange="reversed", ticks="", gridcolor="#e5e7eb")
    figure.update_xaxes(
        gridcolor="#e5e7eb", zeroline=True, zerolinecolor=GREY, title_text="write (rms of stream)"
    )
    figure.update_layout(
        template="none", height=170 + 26 * len(names), margin={"l": 66, "r": 12, "t": 40, "b": 84},
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1f2937"}, scattermode="group",
        legend={"orientation": "h", "yref": "container", "y": 0.0, "yanchor": "bottom", "x": 0, "font": {"size": 12}},
        paper_bgcolor="white", plot_bgcolor="white",
    )  # fmt: skip
    return figure


# ---- what is shown, as plain data ----------------------------------------


def _chosen(
    frame: pd.DataFrame, concept: str | None, template: str | None, n_scenarios: Count
) -> tuple[pd.DataFrame, str]:
    """Rows of one concept under one template, and what the figure says of them."""
    rows = frame if concept is None else frame[frame["concept"] == concept]
    rows = rows if template is None else rows[rows["template"] == template]
    if rows.empty:
        known = ", ".join(
            f"{c} ({t})" for c, t in frame[["concept", "template"]].drop_duplicates().to_numpy()
        )
        raise InputError(
            f"no attribution rows for concept {concept!r}, template {template!r}; expected one of {known or 'none'}; choose among those"
        )
    name, style = str(rows["concept"].iloc[0]), str(rows["template"].iloc[0])
    rows = rows[(rows["concept"] == name) & (rows["template"] == style)]
    counts = frame.attrs.get("n_scenarios", {}) if n_scenarios is None else n_scenarios
    counted = f"n = {counts[name]} scenarios" if name in counts else "n not recorded"
    total = rows[rows["component"] == "total"].set_index("model")
    flags = {flag for value in rows["flags"] for flag in split_flags(value)}
    along = "base's direction" if "base_direction" in flags else "own direction"
    sums = ", ".join(f"{side} {number(total.loc[side, 'write'])}" for side, _ in SIDES)
    return rows, f"{name} · {style} · {along} · total {sums} · {counted}"


def _over_layers(
    rows: pd.DataFrame, model: str, component: str, layers: Float[np.ndarray, " layer"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    names = ["embedding", component] if component == "mlp" else [component]
    mine = rows[(rows["model"] == model) & rows["component"].isin(names)].set_index("layer").reindex(layers)
    value, lower, upper = (mine[f"write{end}"].to_numpy(dtype=float) for end in ("", "_lower", "_upper"))
    return value, lower, upper


def _sheet(rows: pd.DataFrame, caption: str, n_layers: int | None) -> Sheet:
    layers = np.sort(rows.loc[rows["component"].isin(["embedding", "mlp"]), "layer"].astype(float).unique())
    drawn = {
        (model, component): _over_layers(rows, model, component, layers)
        for model in ("base", "aligned", "difference")
        for component in ("attn", "mlp")
    }
    zero = ((0.0, "", GREY, "solid"),)
    both = [
        tuple(Line(side, *drawn[side, component], colour, DASH[side]) for side, colour in SIDES)
        for component in ("attn", "mlp")
    ]
    change = (
        Line("attention", *drawn["difference", "attn"], GREEN),
        Line("MLP", *drawn["difference", "mlp"], ORANGE),
    )
    # One scale for what the two kinds write: otherwise a thousandth looks like a half.
    ends = _limits([*both[0], *both[1]])
    panels = (
        Panel("What attention writes (pointwise 95 %)", UNIT, both[0], zero, None, ends),
        Panel("What MLPs write; emb: the embedding", UNIT, both[1], zero, None, ends),
        Panel("Difference, aligned − base (pointwise 95 %)", UNIT, change, zero, None, _limits(change)),
    )
    # A file does not say how deep the model is: unless the result is at hand, the block read is taken to be its last.
    return Sheet(caption, layers, (layers + 1) / (n_layers or layers[-1] + 1), panels)


def _limits(lines: Any) -> tuple[float, float]:
    ends = np.concatenate([side for line in lines for side in (line.lower, line.upper)])
    ends = ends[np.isfinite(ends)]
    low, high = min(float(ends.min(initial=0.0)), 0.0), max(float(ends.max(initial=0.0)), 0.0)
    room = 0.08 * max(high - low, 1e-6)
    return low - room, high + room


def _ranked_heads(rows: pd.DataFrame, top: int) -> pd.DataFrame:
    """Heads by the size of their difference, one row per head and a column per model and quantity."""
    heads = rows[rows["component"] == "head"].astype({"layer": int, "head": int})
    wide = heads.pivot(
        index=["layer", "head"], columns="model", values=["write", "write_lower", "write_upper", "flags"]
    )
    order = abs(wide["write", "difference"].astype(float)).sort_values(ascending=False, kind="stable").index
    return wide.loc[order[:top]]


def _places(ranked: pd.DataFrame, side: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[bool]]:
    value, lower, upper = (
        ranked[f"write{end}", side].to_numpy(dtype=float) for end in ("", "_lower", "_upper")
    )
    clear = [side != "difference" or "beyond_band" in split_flags(flags) for flags in ranked["flags", side]]
    return value, lower, upper, clear


def _forest(axes: Axes, ranked: pd.DataFrame, side: str, colour: str, shift: float) -> None:
    value, lower, upper, clear = _places(ranked, side)
    y = np.arange(len(value)) + shift
    axes.hlines(y, lower, upper, color=colour, linewidth=1.4)
    faces = [colour if c else "white" for c in clear]
    axes.scatter(value, y, s=26, c=faces, edgecolors=colour, linewidths=1.2, zorder=3, label=side)
