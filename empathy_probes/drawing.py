"""Two small renderers, matplotlib and plotly, of the same plain description of a figure.

A figure is described as data (a `Sheet` of `Panel`s of `Line`s, or a `Grid`) and then drawn, so that the
printed and the interactive one can never show different numbers. Blank cells stay blank: a line is broken
there, and an interval without a point is a bar. Nothing global is changed: figures are
`matplotlib.figure.Figure` objects with their own canvas, and settings live inside a context. Colours are
those of Okabe and Ito (2008), safe for colour-blind readers.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any, cast

import matplotlib
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#6B7280"
DASHES = {"solid": "-", "dash": "--", "dot": ":"}
# Letters of a name along an axis that still stands upright.
LONG = 6
SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "empathy_probes", "svg.fonttype": "none", "text.parse_math": False, "font.size": 11,
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Arial"], "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "axes.edgecolor": GREY, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "legend.frameon": False, "legend.fontsize": 9.5, "lines.linewidth": 1.8, "figure.facecolor": "white",
}  # fmt: skip
"""Settings of our own figures; a concept named `$x$` is a name, not an equation."""


@dataclass(frozen=True)
class Line:
    """One curve over layers."""

    name: str
    """Legend entry."""
    y: Float[np.ndarray, " layer"]
    """Values; NaN where the cell is blank."""
    lower: Float[np.ndarray, " layer"] | None
    """Lower ends of the intervals, or None for a curve without intervals."""
    upper: Float[np.ndarray, " layer"] | None
    """Upper ends of the intervals."""
    colour: str
    """Hex colour."""
    dash: str = "solid"
    """One of `DASHES`."""


def line_of(rows: pd.DataFrame, column: str, name: str, colour: str) -> Line:
    """The curve of a table's column with the interval beside it."""
    value, lower, upper = (
        rows[f"{column}{end}"].to_numpy(dtype=float, na_value=np.nan) for end in ("", "_lower", "_upper")
    )
    return Line(name, value, lower, upper, colour)


@dataclass(frozen=True)
class Panel:
    """One pair of axes with layers along the bottom."""

    title: str
    """What is shown, and what the bands are."""
    unit: str
    """Label of the vertical axis, with its unit."""
    lines: tuple[Line, ...]
    """The curves."""
    marks: tuple[tuple[float, str, str, str], ...] = ()
    """Horizontal lines: height, name, colour, dash."""
    span: tuple[float, float] | None = None
    """First and last layer of a shaded onset set."""
    limits: tuple[float, float] | None = None
    """Fixed range of the vertical axis."""
    bars: bool = False
    """Bars side by side instead of curves: places along the bottom that have no order, or shares of a whole."""


@dataclass(frozen=True)
class Sheet:
    """Panels that share their layers."""

    caption: str
    """Concept, template, site and n."""
    layers: Float[np.ndarray, " layer"]
    """Block indices; −1 is the embedding."""
    depth: Float[np.ndarray, " layer"]
    """(layer + 1) / n_layers."""
    panels: tuple[Panel, ...]
    """From top to bottom."""
    names: tuple[str, ...] = ()
    """What stands at the places along the bottom, where that is no layer; depth is not shown then."""
    axis: str = "layer (emb = embedding)"
    """Label of the horizontal axis."""


@dataclass(frozen=True)
class Grid:
    """A heat map: concepts down, layers across."""

    caption: str
    """What the colours are, template and site."""
    names: tuple[str, ...]
    """Concepts, top to bottom."""
    groups: tuple[tuple[str, int], ...]
    """Name and number of rows of each block of rows."""
    layers: Float[np.ndarray, " layer"]
    """Block indices."""
    values: Float[np.ndarray, "concept layer"]
    """Headline quantity; NaN where blank."""
    marks: tuple[tuple[str, ...], ...]
    """Decision of each cell in one character: ● attenuated, ▲ amplified, = equivalent, – blank."""
    hover: tuple[tuple[str, ...], ...]
    """What the screen version says about each cell."""


def svg(figure: Figure) -> str:
    """A figure as SVG text: equal figures give equal bytes (no date, fixed ids)."""
    buffer = io.StringIO()
    with settings():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


@contextmanager
def settings() -> Iterator[None]:
    """Our settings on top of matplotlib's defaults, whatever the user has set; theirs come back."""
    with matplotlib.rc_context():
        matplotlib.rcParams.update({k: v for k, v in matplotlib.rcParamsDefault.items() if k != "backend"})
        cast(Any, matplotlib.rcParams).update(SETTINGS)
        yield


def draw_sheet(sheet: Sheet) -> Figure:
    """Draw panels with matplotlib.

    Places are set in inches: a layout engine draws every figure twice, and a report has dozens.
    """
    with settings():
        heights = [2.2 if "lost" in panel.title else 1.45 for panel in sheet.panels]
        # Names that do not fit side by side stand on end.
        upright = max(map(len, sheet.names), default=0) > 60 / max(len(sheet.layers), 1)
        room = 0.075 * max(map(len, sheet.names)) if upright else 0.0
        width, gap, above, below = 7.2, 0.78, 0.66 if sheet.names else 1.0, 1.12 + room
        height = sum(heights) + gap * (len(heights) - 1) + above + below
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        drawn: list[Axes] = []
        top = height - above
        for panel, size in zip(sheet.panels, heights, strict=True):
            place = (0.95 / width, (top - size) / height, (width - 1.05) / width, size / height)
            axes = figure.add_axes(place, sharex=drawn[0] if drawn else None)
            _draw_panel(axes, panel, sheet.layers, room if panel is sheet.panels[-1] else None)
            axes.yaxis.set_label_coords(-0.54 / (width - 1.05), 0.5)
            axes.tick_params(labelbottom=panel is sheet.panels[-1])
            drawn.append(axes)
            top -= size + gap
        ticks, names = _places(sheet)
        drawn[-1].set_xticks(ticks, names, rotation=90 if upright else 0)
        drawn[-1].set_xlabel(sheet.axis)
        if not sheet.names:
            depth = drawn[0].secondary_xaxis("top")
            where = dict(zip(sheet.layers, sheet.depth, strict=True))
            depth.set_xticks(ticks, [f"{where[t]:.2f}" if np.isfinite(where[t]) else "" for t in ticks])
            depth.set_xlabel("depth (fraction of blocks done)", fontsize=9.5)
            depth.tick_params(labelsize=9.5)
        figure.text(0.1 / width, 1 - 0.18 / height, sheet.caption, va="center", fontsize=11, color=GREY)
    return figure


def _draw_panel(axes: Axes, panel: Panel, x: Float[np.ndarray, " layer"], room: float | None) -> None:
    """One panel; `room` is what upright names take below the lowest one, in inches, None for the others."""
    for height, name, colour, dash in panel.marks:
        axes.axhline(height, color=colour, linestyle=DASHES[dash], linewidth=1.0, label=name or "_")
    if panel.span is not None:
        low, high = panel.span
        axes.axvspan(low - 0.5, high + 0.5, color=ORANGE, alpha=0.18, linewidth=0, label="onset set")
    for k, line in enumerate(panel.lines):
        if panel.bars:
            size = 0.8 / len(panel.lines)
            at = x + (k - (len(panel.lines) - 1) / 2) * size
            axes.bar(at, line.y, size * 0.92, color=line.colour, alpha=0.75, label=line.name)
            if line.lower is not None and line.upper is not None:
                axes.vlines(at, line.lower, line.upper, color=BLACK, linewidth=1.1)
            continue
        ring = "white" if line.dash == "solid" else line.colour
        axes.plot(x, line.y, color=line.colour, linestyle=DASHES[line.dash], marker="o", markersize=4.5,
                  markeredgecolor=ring, markeredgewidth=0.6, label=line.name)  # fmt: skip
        if line.lower is not None and line.upper is not None:
            axes.fill_between(x, line.lower, line.upper, color=line.colour, alpha=0.16, linewidth=0)
            axes.vlines(x, line.lower, line.upper, color=line.colour, alpha=0.45, linewidth=1.0)
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    elif not panel.bars:
        axes.set_ylim(bottom=0)
    axes.set_ylabel(panel.unit)
    axes.set_title(panel.title)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    entries = len([1 for label in axes.get_legend_handles_labels()[1] if not label.startswith("_")])
    # The lowest panel's legend goes below the layer numbers, at a distance in points whatever the panel's height.
    drop = 2 if room is None else 40 + 72 * room
    below = ScaledTranslation(0, -drop / 72, axes.figure.dpi_scale_trans)
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=axes.transAxes + below, ncols=min(entries, 3),
        handlelength=1.6, borderpad=0.2, columnspacing=1.2,
    )  # fmt: skip


def draw_grid(grid: Grid) -> Figure:
    with settings():
        rows, columns = grid.values.shape
        figure = Figure(figsize=(7.2, 1.5 + 0.3 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        colours = LinearSegmentedColormap.from_list("attenuation", [BLUE, "#ffffff", VERMILLION])
        scale = colours.with_extremes(bad="#e5e7eb")
        image = axes.imshow(grid.values, cmap=scale, vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
        for i in range(rows):
            for j in range(columns):
                strong = np.isfinite(grid.values[i, j]) and abs(grid.values[i, j]) > 0.8
                axes.text(j, i, grid.marks[i][j], ha="center", va="center", fontsize=10,
                          color="white" if strong else "#1f2937")  # fmt: skip
        ticks = _ticks(grid.layers)
        axes.set_xticks(np.searchsorted(grid.layers, ticks), _layer_names(ticks))
        axes.set_yticks(range(rows), list(grid.names))
        start = 0
        for name, size in grid.groups:
            if start:
                axes.axhline(start - 0.5, color=GREY, linewidth=1.2)
            axes.text(columns - 0.35, start + (size - 1) / 2, name.replace(" ", "\n") if size > 1 else name,
                      va="center", fontsize=9, color=GREY, clip_on=False)  # fmt: skip
            start += size
        axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="#e5e7eb", linewidth=0.8)
        axes.tick_params(which="both", length=0)
        axes.set_xlabel("layer   (● attenuated   ▲ amplified   = equivalent   ≥ at least   – blank)")
        axes.set_title(grid.caption, color=GREY, fontweight="normal", fontsize=10)
        for spine in axes.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.5, aspect=30, pad=0.03)
        bar.set_label("amplified  ←  0  →  attenuated (1 = gone)", fontsize=9.5)
    return figure


def _places(sheet: Sheet) -> tuple[list[float], list[str]]:
    """What is labelled along the bottom, and how."""
    if sheet.names:
        return [float(v) for v in sheet.layers], list(sheet.names)
    ticks = _ticks(sheet.layers)
    return ticks, _layer_names(ticks)


def _ticks(layers: Float[np.ndarray, " layer"]) -> list[float]:
    """At most about 13 layers to label, the first and the last among them."""
    step = max(1, -(-len(layers) // 13))
    chosen = list(layers[::step])
    if chosen[-1] != layers[-1]:
        chosen = [*chosen[:-1], layers[-1]] if len(chosen) > 1 else [*chosen, layers[-1]]
    return [float(v) for v in chosen]


def _layer_names(layers: list[float]) -> list[str]:
    return ["emb" if layer < 0 else f"{layer:.0f}" for layer in layers]


def plotly_sheet(sheet: Sheet) -> Any:
    """Draw panels with plotly, layers along the bottom and depth along the top."""
    from plotly.subplots import make_subplots

    heights = [1.5 if "lost" in p.title else 1.0 for p in sheet.panels]
    figure = make_subplots(
        rows=len(heights), cols=1, shared_xaxes=True, vertical_spacing=0.075, row_heights=heights,
        subplot_titles=[f"<b>{escape(p.title)}</b>" for p in sheet.panels],
    )  # fmt: skip
    named: set[str] = set()
    for row, panel in enumerate(sheet.panels, start=1):
        _plotly_panel(figure, row, panel, sheet, named)
    ticks, names = _places(sheet)
    figure.update_xaxes(
        tickvals=ticks, ticktext=[escape(n) for n in names], showgrid=False, zeroline=False, showline=True
    )
    if max(map(len, sheet.names), default=0) > LONG:  # they say themselves what they are, and need the room
        figure.update_xaxes(tickangle=-45, automargin=True)
    else:
        figure.update_xaxes(title_text=sheet.axis, row=len(heights), col=1)
    figure.update_xaxes(range=_ends(sheet))
    figure.update_yaxes(gridcolor="#e5e7eb", zeroline=False, showline=True)
    figure.update_layout(
        template="none", height=int(140 + 190 * sum(heights)), margin={"l": 66, "r": 12, "t": 64, "b": 84},
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1f2937"}, hovermode="closest",
        legend={"orientation": "h", "yref": "container", "y": 0.0, "yanchor": "bottom", "x": 0, "font": {"size": 12}},
        paper_bgcolor="white", plot_bgcolor="white",
    )  # fmt: skip
    figure.update_annotations(x=0, xanchor="left", font={"size": 13})
    if sheet.names:
        figure.update_layout(barmode="group", bargap=0.2)
    else:
        figure.layout.annotations[0].yshift = 34  # above the depth axis
        _depth_axis(figure, sheet, ticks)
    return figure


def _depth_axis(figure: Any, sheet: Sheet, ticks: list[float]) -> None:
    """Depth along the top of the first panel: an axis shows only where a trace is bound to it, so an empty one is."""
    from plotly import graph_objects as go

    where = dict(zip(sheet.layers.tolist(), sheet.depth.tolist(), strict=True))
    names = [f"{where[t]:.2f}" if np.isfinite(where[t]) else "" for t in ticks]
    figure.add_trace(
        go.Scatter(x=ticks, y=[None] * len(ticks), xaxis="x9", yaxis="y", showlegend=False, hoverinfo="skip")
    )
    figure.update_layout(
        xaxis9={
            "overlaying": "x", "matches": "x", "range": _ends(sheet), "side": "top", "tickvals": ticks, "ticktext": names, "showgrid": False,
            "zeroline": False, "tickfont": {"size": 11}, "title": {"text": "depth", "font": {"size": 11}, "standoff": 2},
        }
    )  # fmt: skip


def _plotly_panel(figure: Any, row: int, panel: Panel, sheet: Sheet, named: set[str]) -> None:
    from plotly import graph_objects as go

    def once(name: str) -> dict[str, Any]:
        """Legend settings: one entry for all curves of one name; a click hides them together."""
        shown = bool(name) and name not in named
        named.add(name)
        return {"name": name, "legendgroup": name, "showlegend": shown}

    ends = _ends(sheet)
    for height, name, colour, dash in panel.marks:
        stroke = {"color": colour, "dash": dash, "width": 1}
        trace = go.Scatter(x=ends, y=[height] * 2, mode="lines", line=stroke, hoverinfo="skip", **once(name))
        figure.add_trace(trace, row=row, col=1)
    if panel.span is not None:
        low, high = panel.span
        figure.add_vrect(
            x0=low - 0.5, x1=high + 0.5, fillcolor=ORANGE, opacity=0.18, line_width=0, row=row, col=1,
            name="onset set", showlegend=True,
        )  # fmt: skip
    for line in panel.lines:
        label = once(line.name)
        if panel.bars:
            error: dict[str, Any] = {
                "type": "data",
                "symmetric": False,
                "thickness": 1.2,
                "width": 0,
                "color": BLACK,
            }
            if line.lower is not None and line.upper is not None:
                error |= {"array": _blank(line.upper - line.y), "arrayminus": _blank(line.y - line.lower)}
            bar = go.Bar(
                x=sheet.layers.tolist(), y=_blank(line.y), marker={"color": line.colour, "opacity": 0.75}, error_y=error,
                hovertext=_hover(line, sheet), hoverinfo="text", **label,
            )  # fmt: skip
            figure.add_trace(bar, row=row, col=1)
            continue
        if line.lower is not None and line.upper is not None:
            x, outline = _outline(sheet.layers, line.lower, line.upper)
            faint = _faint(line.colour)
            band = go.Scatter(
                x=x, y=outline, mode="lines", fill="toself", hoverinfo="skip", fillcolor=faint,
                line={"color": faint, "width": 1}, **{**label, "showlegend": False},
            )  # fmt: skip
            figure.add_trace(band, row=row, col=1)
        figure.add_trace(
            go.Scatter(
                x=sheet.layers.tolist(), y=_blank(line.y), mode="lines+markers", hovertext=_hover(line, sheet),
                hoverinfo="text", line={"color": line.colour, "dash": line.dash, "width": 2}, marker={"size": 6},
                connectgaps=False, **label,
            ),
            row=row, col=1,
        )  # fmt: skip
    limits = list(panel.limits) if panel.limits is not None else None
    free = "normal" if limits or panel.bars else "tozero"
    figure.update_yaxes(
        title={"text": escape(panel.unit).replace("\n", "<br>"), "font": {"size": 12}, "standoff": 10}, range=limits,
        automargin=True,
        rangemode=free, row=row, col=1,
    )  # fmt: skip


def _outline(x: Any, lower: Any, upper: Any) -> tuple[list[float | None], list[float | None]]:
    """Closed outlines of a band, one for each unbroken run of layers."""
    found = np.isfinite(lower) & np.isfinite(upper)
    xs: list[float | None] = []
    ys: list[float | None] = []
    for run in np.split(np.arange(len(x)), np.flatnonzero(np.diff(found.astype(int))) + 1):
        if found[run[0]]:
            xs += [*x[run].tolist(), *x[run][::-1].tolist(), float(x[run[0]]), None]
            ys += [*upper[run].tolist(), *lower[run][::-1].tolist(), float(upper[run[0]]), None]
    return xs, ys


def _hover(line: Line, sheet: Sheet) -> list[str]:
    texts = []
    for i, (layer, depth) in enumerate(zip(sheet.layers, sheet.depth, strict=True)):
        where = f"{'embedding' if layer < 0 else f'layer {layer:.0f}'} (depth {depth:.2f})"
        if sheet.names:
            where = escape(sheet.names[i])
        band = ""
        if line.lower is not None and line.upper is not None and np.isfinite(line.lower[i] + line.upper[i]):
            band = f" [{line.lower[i]:.3f}, {line.upper[i]:.3f}]"
        texts.append(f"<b>{escape(line.name)}</b><br>{where}<br>{line.y[i]:.3f}{band}")
    return texts


def _ends(sheet: Sheet) -> list[float]:
    """Half a layer beyond the first and the last."""
    return [float(sheet.layers[0]) - 0.5, float(sheet.layers[-1]) + 0.5]


def _blank(values: Any) -> list[float | None]:
    """NaN as null, which is what JSON knows."""
    return [float(v) if np.isfinite(v) else None for v in values]


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.16)"


def plotly_grid(grid: Grid) -> Any:
    """Draw a heat map with plotly; each group of rows has its name in a free row above it."""
    from plotly import graph_objects as go

    columns, ticks = grid.values.shape[1], _ticks(grid.layers)
    names: list[str] = []
    rows: list[int | None] = []  # row of the grid, or None for the free row that holds a group's name
    figure = go.Figure()
    for group, size in grid.groups:
        figure.add_annotation(
            x=-0.5, xanchor="left", y=len(rows), text=f"<b>{escape(group)}</b>", showarrow=False,
            font={"size": 11, "color": GREY},
        )  # fmt: skip
        first = sum(row is not None for row in rows)
        rows += [None, *range(first, first + size)]
        names += ["", *(_short(name) for name in grid.names[first : first + size])]
    free = [None] * columns
    values = [free if row is None else _blank(grid.values[row]) for row in rows]
    blanks = [
        free if row is None else [0 if v is None else None for v in _blank(grid.values[row])] for row in rows
    ]
    shared: dict[str, Any] = {
        "xgap": 1, "ygap": 1, "texttemplate": "%{text}", "hovertemplate": "%{hovertext}<extra></extra>",
        "text": [[""] * columns if row is None else grid.marks[row] for row in rows],
        "hovertext": [[""] * columns if row is None else grid.hover[row] for row in rows], "hoverongaps": False,
    }  # fmt: skip
    grey = [[0, "#e5e7eb"], [1, "#e5e7eb"]]
    figure.add_trace(go.Heatmap(z=blanks, showscale=False, colorscale=grey, **shared))
    bar = {
        "orientation": "h", "thickness": 10, "len": 0.7, "yref": "container", "y": 0.0, "yanchor": "bottom",
        "tickvals": [-1, -0.5, 0, 0.5, 1], "ticktext": ["−1", "−0.5", "0", "0.5", "1"], "tickfont": {"size": 11},
    }  # fmt: skip
    scale = [[0, BLUE], [0.5, "#ffffff"], [1, VERMILLION]]
    figure.add_trace(go.Heatmap(z=values, zmin=-1, zmax=1, colorscale=scale, colorbar=bar, **shared))
    for y, row in enumerate(rows):
        if row is not None:
            frame = {"color": "#e5e7eb", "width": 1}
            figure.add_shape(x0=-0.5, x1=columns - 0.5, y0=y - 0.5, y1=y + 0.5, line=frame, layer="below")
    quiet = {"showgrid": False, "zeroline": False, "ticks": ""}
    places = list(np.searchsorted(grid.layers, ticks))
    figure.update_xaxes(tickvals=places, ticktext=_layer_names(ticks), title_text="layer", **quiet)
    figure.update_yaxes(
        tickvals=list(range(len(rows))), ticktext=names, range=[len(rows) - 0.5, -0.5], **quiet
    )
    figure.update_layout(
        template="none", height=130 + 24 * len(rows), margin={"l": 118, "r": 12, "t": 8, "b": 104},
        font={"family": "system-ui, sans-serif", "size": 12, "color": "#1f2937"}, paper_bgcolor="white",
        plot_bgcolor="white",
    )  # fmt: skip
    return figure


def _short(name: str) -> str:
    """A name that fits beside a heat map on a phone, escaped because plotly reads a subset of HTML."""
    return escape(name if len(name) <= 20 else name[:19] + "…")
