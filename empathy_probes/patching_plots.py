"""Figures of patching, of its estimate from gradients, and of transplants, from their tables.

Roles of positions are curves over layers; single heads and single tokens are a map of rows over layers. Every figure
shows nothing (0) and the whole effect (1), the interval of every number that has one, and n where the table knows it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
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
    settings,
)
from empathy_probes.errors import InputError

ROLE_COLOURS = {
    "last": VERMILLION, "span": BLUE, "after": GREEN, "before": GREY, "template": PURPLE, "all": BLACK,
}  # fmt: skip
VARIANTS = {
    "concept": ("its component (band)", GREEN, "solid"),
    "full": ("full state", BLACK, "solid"),
    "complement": ("all but it", ORANGE, "solid"),
    "random": ("random directions", GREY, "dash"),
    "shuffled": ("other scenario's", PURPLE, "dot"),
}
DIRECTIONS = {
    "denoise": "Clean activation into the corrupted run",
    "noise": "Corrupted activation into the clean run",
}
INTO = {"base_into_aligned": "Base's part in the aligned model", "aligned_into_base": "Aligned model's part in the base"}  # fmt: skip
ENDS = ((0.0, "", GREY, "solid"), (1.0, "whole effect", GREY, "dot"))


def patching_figure(
    frame: pd.DataFrame, concept: str | None = None, *, template: str | None = None, site: str | None = None
) -> Figure:
    """Share recovered over layers; a map where single heads or tokens were patched.

    Args:
        frame: columns of patching.csv.
        concept, template, site: which of them; the first in the frame by default.

    Raises:
        InputError: no row fits.
    """
    rows = _rows(frame, concept=concept, template=template, site=site)
    return _draw_map(rows) if _is_map(rows) else draw_sheet(_patching_sheet(rows))


def patching_plotly(
    frame: pd.DataFrame, concept: str | None = None, *, template: str | None = None, site: str | None = None
) -> Any:
    """The same as `patching_figure`, as a plotly figure."""
    rows = _rows(frame, concept=concept, template=template, site=site)
    return _plotly_map(rows) if _is_map(rows) else plotly_sheet(_patching_sheet(rows))


def transplant_figure(
    frame: pd.DataFrame, concept: str | None = None, *, template: str | None = None, position: str | None = None,
    frontier: pd.DataFrame | None = None,
) -> Figure:  # fmt: skip
    """Share of the models' difference that a transplant after each layer brings along, both ways.

    Args:
        frame: as `Transplants.to_frame` gives it.
        concept, template, position: which of them; the first in the frame by default.
        frontier: as `Transplants.frontier_frame` gives it, to shade the layers from which it may repair.

    Raises:
        InputError: no row fits.
    """
    return draw_sheet(
        _transplant_sheet(_rows(frame, concept=concept, template=template, position=position), frontier)
    )


def transplant_plotly(
    frame: pd.DataFrame, concept: str | None = None, *, template: str | None = None, position: str | None = None,
    frontier: pd.DataFrame | None = None,
) -> Any:  # fmt: skip
    """The same as `transplant_figure`, as a plotly figure."""
    return plotly_sheet(
        _transplant_sheet(_rows(frame, concept=concept, template=template, position=position), frontier)
    )


def estimate_figure(
    frame: pd.DataFrame, concept: str | None = None, *, template: str | None = None
) -> Figure:
    """Estimated against exact patching wherever it was checked, one panel per direction.

    Args:
        frame: as `EstimatedPatching.to_frame` gives it.
        concept, template: the first by default.

    Raises:
        InputError: no row fits.
    """
    rows = _rows(frame, concept=concept, template=template)
    checked = rows[rows["checked"].isin(("top", "sample"))]
    ways = list(dict.fromkeys(rows["direction"]))
    with settings():
        figure = Figure(figsize=(7.2, 3.9), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(ways), squeeze=False, sharex=True, sharey=True)[0]
        for axes, way in zip(panels, ways, strict=True):
            axes.axhline(0, color=GREY, linewidth=0.8)
            axes.axvline(0, color=GREY, linewidth=0.8)
            here = checked[checked["direction"] == way]
            for kind, name, colour in (("sample", "random sample of the rest", SKY), ("top", "largest estimates", VERMILLION)):  # fmt: skip
                part = here[here["checked"] == kind]
                x, y = _values(part, "exact"), _values(part, "estimated")
                axes.errorbar(
                    x, y, xerr=_reach(part, "exact", x), yerr=_reach(part, "estimated", y), fmt="o", color=colour, markersize=5,
                    markeredgecolor="white", linewidth=1.0, label=f"{name} ({len(part)})",
                )  # fmt: skip
            axes.axline((0, 0), slope=1, color=GREY, linestyle=":", linewidth=1.0, label="equal")
            axes.set_title("Into the corrupted run" if way == "denoise" else "Into the clean run")
            axes.set_xlabel("exact patching (share of the effect)")
        panels[0].set_ylabel("estimated from gradients\n(share of the effect)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=3)
        figure.suptitle(_caption(rows, "every place that was checked, 95 %"), x=0.01, ha="left", fontsize=11, color=GREY)  # fmt: skip
    return figure


# ---- what is shown, as plain data ----------------------------------------


def _rows(frame: pd.DataFrame, **wanted: str | None) -> pd.DataFrame:
    """The rows of one concept (and template, site, …), the first where none is named."""
    rows = frame
    for column, value in wanted.items():
        known = list(dict.fromkeys(rows[column])) if len(rows) else []
        chosen = known[0] if value is None and known else value
        rows = rows[rows[column] == chosen]
        if rows.empty:
            raise InputError(
                f"no rows with {column} {value!r}, expected one of {', '.join(map(str, known)) or 'some rows'}; choose among those"
            )
    rows = rows.copy()
    rows.attrs = frame.attrs
    return rows


def _values(rows: pd.DataFrame, name: str) -> np.ndarray:
    return pd.to_numeric(rows[name], errors="coerce").to_numpy(dtype=float, na_value=np.nan)


def _reach(rows: pd.DataFrame, name: str, centre: np.ndarray) -> np.ndarray:
    """Distances from a value to both ends of its interval, 0 where there is none."""
    ends = np.stack([centre - _values(rows, f"{name}_lower"), _values(rows, f"{name}_upper") - centre])
    return np.maximum(np.where(np.isfinite(ends), ends, 0), 0)


def _caption(rows: pd.DataFrame, what: str) -> str:
    concept = str(rows["concept"].iloc[0])
    n = rows["n_scenarios"].iloc[0] if "n_scenarios" in rows else rows.attrs.get("n_scenarios", {}).get(concept)  # fmt: skip
    counted = "" if n is None else f" · n = {n} scenarios"
    return f"{concept} · {rows['template'].iloc[0]} · {what}{counted}"


def _line(
    rows: pd.DataFrame, layers: np.ndarray, name: str, label: str, colour: str, dash: str, ends: str
) -> Line:
    at = rows.drop_duplicates("layer").set_index("layer").reindex(layers.astype(int))
    return Line(label, _values(at, name), _values(at, f"{ends}_lower"), _values(at, f"{ends}_upper"), colour, dash)  # fmt: skip


def _limits(lines: tuple[Line, ...]) -> tuple[float, float]:
    found = np.concatenate([a for line in lines for a in (line.y, line.lower, line.upper) if a is not None])
    found = found[np.isfinite(found)]
    return max(-1.0, found.min(initial=-0.05) - 0.07), min(2.0, found.max(initial=1.05) + 0.07)


def _layers(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Layers and their depth; the last layer in the table is taken to be the last block."""
    layers = np.sort(rows["layer"].unique()).astype(float)
    return layers, (layers + 1) / (layers[-1] + 1 if layers[-1] >= 0 else 1)


def _patching_sheet(rows: pd.DataFrame) -> Sheet:
    layers, depth = _layers(rows)
    panels = []
    models = list(dict.fromkeys(rows["model"]))
    for model in models:
        for way in dict.fromkeys(rows["direction"]):
            here = rows[(rows["model"] == model) & (rows["direction"] == way)]
            roles = [r for r in ROLE_COLOURS if r in set(here["position"])]
            lines = tuple(
                _line(here[here["position"] == role], layers, "recovered", role, ROLE_COLOURS[role], "solid", "recovered")
                for role in roles
            )  # fmt: skip
            title = DIRECTIONS[way] if len(models) == 1 else f"{DIRECTIONS[way]} · {model}"
            panels.append(
                Panel(f"{title} (95 %)", "recovered\n(share of effect)", lines, ENDS, None, _limits(lines))
            )
    return Sheet(_caption(rows, str(rows["site"].iloc[0])), layers, depth, tuple(panels))


def _transplant_sheet(rows: pd.DataFrame, frontier: pd.DataFrame | None) -> Sheet:
    layers, depth = _layers(rows)
    panels = []
    position, concept = str(rows["position"].iloc[0]), rows["concept"].iloc[0]
    for order in dict.fromkeys(rows["order"]):
        here = rows[rows["order"] == order]
        lines = tuple(
            _line(here[here["variant"] == variant], layers, "repaired", label, colour, dash,
                  "band" if variant == "concept" else "repaired")
            for variant, (label, colour, dash) in VARIANTS.items()
        )  # fmt: skip
        span = None
        if frontier is not None:
            found = frontier[(frontier["concept"] == concept) & (frontier["order"] == order)
                             & (frontier["position"] == position) & (frontier["template"] == rows["template"].iloc[0])]  # fmt: skip
            ends = [_values(found, f"frontier_{end}") for end in ("lower", "upper")]
            if len(found) and np.isfinite(ends).all():
                span = (float(ends[0][0]), float(ends[1][0]))
        marks = ((0.0, "", GREY, "solid"), (1.0, "", GREY, "dot"))
        title = f"{INTO[order]} (0 as before, 1 as the donor; 95 %)"
        panels.append(Panel(title, "repaired\n(share of gap)", lines, marks, span, _limits(lines)))
    where = "at the read position" if position == "read" else "at all positions"
    return Sheet(_caption(rows, where), layers, depth, tuple(panels))


# ---- maps of single heads and tokens -------------------------------------


def _is_map(rows: pd.DataFrame) -> bool:
    return bool(rows["head"].notna().any()) or bool(rows["position"].astype(str).str.fullmatch(r"\d+").any())


def _maps(rows: pd.DataFrame) -> tuple[str, list[tuple[str, pd.DataFrame]]]:
    """What is down the side, and per direction a table of shares: rows by head or token, columns by layer."""
    heads = bool(rows["head"].notna().any())
    found = []
    for (model, way), part in rows.groupby(["model", "direction"], sort=False):
        chosen = part[part["position"] == part["position"].iloc[0]] if heads else part
        side = chosen["head"].astype(int) if heads else chosen["position"].astype(int)
        table = chosen.assign(side=side).pivot_table(index="side", columns="layer", values="recovered", dropna=False)  # fmt: skip
        where = f" · {chosen['position'].iloc[0]}" if heads else ""
        found.append((f"{DIRECTIONS[str(way)]} · {model}{where}", table.astype(float)))
    return ("head" if heads else "token"), found


def _layer_names(table: pd.DataFrame) -> list[str]:
    return ["emb" if int(str(layer)) < 0 else str(layer) for layer in table.columns]


def _draw_map(rows: pd.DataFrame) -> Figure:
    side, maps = _maps(rows)
    with settings():
        height = 0.26 * len(maps[0][1]) + 0.75
        figure = Figure(figsize=(7.2, 1.1 + height * len(maps)), layout="constrained")
        FigureCanvasAgg(figure)
        scale = LinearSegmentedColormap.from_list("recovered", [BLUE, "#ffffff", VERMILLION])
        panels = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
        for axes, (title, table) in zip(panels, maps, strict=True):
            image = axes.imshow(
                table.to_numpy(), cmap=scale.with_extremes(bad="#e5e7eb"), vmin=-1, vmax=1, aspect="auto", interpolation="nearest"
            )  # fmt: skip
            step = max(1, -(-len(table) // 12))
            axes.set_yticks(range(0, len(table), step), [str(i) for i in table.index[::step]])
            across, names = max(1, -(-table.shape[1] // 16)), _layer_names(table)
            axes.set_xticks(range(0, table.shape[1], across), names[::across])
            if table.size <= 200:
                for (i, j), share in np.ndenumerate(table.to_numpy()):
                    shown = "" if np.isnan(share) else f"{share:.2f}".replace("-0.00", "0.00")
                    axes.text(j, i, shown, ha="center", va="center", fontsize=8)
            axes.set_ylabel(side)
            axes.set_title(title)
            for spine in axes.spines.values():
                spine.set_visible(False)
        panels[-1].set_xlabel("layer (emb = embedding)")
        bar = figure.colorbar(image, ax=list(panels), location="bottom", shrink=0.5, aspect=30, pad=0.03, ticks=[-1, -0.5, 0, 0.5, 1])  # fmt: skip
        bar.set_label("recovered (share of the effect; grey: blank)", fontsize=9.5)
        figure.suptitle(_caption(rows, str(rows["site"].iloc[0])), x=0.01, ha="left", fontsize=11, color=GREY)
    return figure


def _plotly_map(rows: pd.DataFrame) -> Any:
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    side, maps = _maps(rows)
    figure = make_subplots(
        rows=len(maps), cols=1, shared_xaxes=True, subplot_titles=[title for title, _ in maps], vertical_spacing=0.12
    )  # fmt: skip
    for row, (_, table) in enumerate(maps, start=1):
        values = [[None if np.isnan(v) else float(v) for v in line] for line in table.to_numpy()]
        figure.add_trace(
            go.Heatmap(
                z=values, x=_layer_names(table), y=[str(i) for i in table.index], zmin=-1, zmax=1,
                colorscale=[[0, BLUE], [0.5, "#ffffff"], [1, VERMILLION]], showscale=row == 1, xgap=1, ygap=1,
                hovertemplate=f"layer %{{x}}, {side} %{{y}}<br>recovered %{{z:.3f}}<extra></extra>",
            ),
            row=row, col=1,
        )  # fmt: skip
        figure.update_yaxes(title_text=side, autorange="reversed", type="category", row=row, col=1)
    figure.update_xaxes(type="category")
    figure.update_xaxes(title_text="layer (emb = embedding)", row=len(maps), col=1)
    figure.update_layout(
        template="none", height=120 + len(maps) * (70 + 20 * len(maps[0][1])), margin={"l": 60, "r": 12, "t": 40, "b": 60},
        font={"family": "system-ui, sans-serif", "size": 12, "color": "#1f2937"}, paper_bgcolor="white", plot_bgcolor="#e5e7eb",
    )  # fmt: skip
    return figure
