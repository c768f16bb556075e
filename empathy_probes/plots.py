"""Figures of results, once for paper (matplotlib) and once for the screen (plotly).

What a figure shows is decided here, from the columns of attenuation.csv and onset.csv; how it is drawn is
decided in `drawing`. Every figure of a concept shows base and aligned, the interval of every number, the
margin, zero, chance, the lexical floor and n.
"""

from collections.abc import Callable
from functools import singledispatch
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from empathy_probes.attribution_plots import attribution_figure
from empathy_probes.coupling_plots import coupling_figure
from empathy_probes.drawing import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILLION,
    Grid,
    Line,
    Panel,
    Sheet,
    draw_grid,
    draw_sheet,
    plotly_grid,
    plotly_sheet,
)  # fmt: skip
from empathy_probes.errors import InputError
from empathy_probes.patching_plots import estimate_figure, patching_figure, transplant_figure
from empathy_probes.steering_plots import ablation_figure, gain_figure
from empathy_probes.stitching_plots import stitching_figure
from empathy_probes.trend_plots import trend_figure

FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "coupling": coupling_figure,
    "lineage": trend_figure,
    "stitching": stitching_figure,
    "gain": gain_figure,
    "ablation": ablation_figure,
    "patching": patching_figure,
    "attribution": attribution_figure,
    "attribution_patching": estimate_figure,
    "transplant": transplant_figure,
}
"""Key of a result → its figure, from its table; attenuation, the first of them, is drawn below."""


@singledispatch
def plot(result: Any) -> Figure:
    """Draw any result.

    A study (anything with `tables`) gives its overview; a result that knows `to_frame()` gives the figure of
    its first concept.

    Raises:
        InputError: The result is of a kind that no figure is known for.
    """
    if hasattr(result, "tables"):
        frame = result.tables["attenuation"]
        return overview_figure(frame, template=headline_template(frame), site=_sites(frame)[0])
    if getattr(result, "key", "") in FIGURES:
        return FIGURES[result.key](result.to_frame())
    if hasattr(result, "to_frame"):
        return plot(result.to_frame())
    raise InputError(
        f"plot got a {type(result).__name__}, expected a study, a result or a frame with the columns of "
        "attenuation.csv; pass one of those"
    )


@plot.register
def _(result: pd.DataFrame) -> Figure:
    """Draw the first concept of a frame with the columns of attenuation.csv."""
    needed = {"concept", "template", "site", "measure", "layer", "base", "aligned", "attenuation"}
    if missing := sorted(needed - set(result.columns)):
        raise InputError(
            f"plot got a frame without {missing}, expected the columns of attenuation.csv; add them"
        )
    if result.empty:
        raise InputError("plot got a frame without rows, expected at least one concept; measure one first")
    first = str(result["concept"].iloc[0])
    template, site = headline_template(result), _sites(result)[0]
    return attenuation_figure(result, None, first, template=template, site=site)


def attenuation_figure(
    frame: pd.DataFrame, onset: pd.DataFrame | None, concept: str, *, template: str, site: str,
    planted: dict[str, Any] | None = None, margin: float = 0.10, margin_specific: float | None = None,
) -> Figure:  # fmt: skip
    """Strength, attenuation and decodability of one concept over layers, for files and print.

    Args:
        frame: Columns of attenuation.csv.
        onset: Columns of onset.csv, or None for no shaded onset set.
        concept: Which concept.
        template: Which template (raw, shared, own).
        site: Which site.
        planted: Content of truth.json, drawn as a dashed line where it is about this concept.
        margin: Smallest attenuation that counts.
        margin_specific: Margin of `specific`, where it was set apart.

    Raises:
        InputError: The frame has no number for this concept, template and site.
    """
    return draw_sheet(_sheet(frame, onset, concept, template, site, planted, margin, margin_specific))


def attenuation_plotly(
    frame: pd.DataFrame, onset: pd.DataFrame | None, concept: str, *, template: str, site: str,
    planted: dict[str, Any] | None = None, margin: float = 0.10, margin_specific: float | None = None,
) -> Any:  # fmt: skip
    """The same as `attenuation_figure`, as a plotly figure."""
    return plotly_sheet(_sheet(frame, onset, concept, template, site, planted, margin, margin_specific))


def overview_figure(
    frame: pd.DataFrame, *, template: str, site: str, concepts: dict[str, Any] | None = None,
    roles: tuple[str, ...] = ("target", "control"),
) -> Figure:  # fmt: skip
    """Headline quantity of every concept at every layer, worst first within its group.

    Args:
        frame: Columns of attenuation.csv.
        template: Which template.
        site: Which site.
        concepts: Entry `concepts` of a manifest, for the mechanisms.
        roles: Which roles to show, in this order.

    Raises:
        InputError: No row of the frame fits.
    """
    return draw_grid(_grid(frame, template, site, concepts or {}, roles))


def overview_plotly(
    frame: pd.DataFrame, *, template: str, site: str, concepts: dict[str, Any] | None = None,
    roles: tuple[str, ...] = ("target", "control"),
) -> Any:  # fmt: skip
    """The same as `overview_figure`, as a plotly figure."""
    return plotly_grid(_grid(frame, template, site, concepts or {}, roles))


def headline_template(frame: pd.DataFrame) -> str:
    """The template that headlines quote: shared where it was measured, else raw, else own."""
    present = [str(t) for t in frame["template"].dropna().unique()]
    return next((t for t in ("shared", "raw", "own") if t in present), present[0] if present else "raw")


# ---- what is shown, as plain data ----------------------------------------


def _sites(frame: pd.DataFrame) -> list[str]:
    return [str(s) for s in frame["site"].dropna().unique() if s != "text"] or ["resid_post"]


def _column(rows: pd.DataFrame, name: str) -> Float[np.ndarray, " layer"]:
    """A column as floats, NaN where blank or absent."""
    if name not in rows.columns:
        return np.full(len(rows), np.nan)
    return pd.to_numeric(rows[name], errors="coerce").to_numpy(dtype=float, na_value=np.nan)


def about_specific(rows: pd.DataFrame) -> Bool[np.ndarray, " row"]:
    """Rows whose band and decision are about `specific`; about `attenuation` where there are too few controls."""
    known = np.isfinite(_column(rows, "specific")) | np.isfinite(_column(rows, "specific_lower"))
    few = (
        rows["flags"]
        .astype("string")
        .str.contains(r"\b(?:few|no)_controls\b")
        .fillna(False)
        .to_numpy(dtype=bool)
    )
    return known & ~few


def _line(rows: pd.DataFrame, column: str, name: str, colour: str) -> Line:
    value, lower, upper = (_column(rows, f"{column}{end}") for end in ("", "_lower", "_upper"))
    return Line(name, value, lower, upper, colour)


def _quantity(rows: pd.DataFrame, column: str, headline: Bool[np.ndarray, " row"], colour: str) -> Line:
    """A quantity with the simultaneous band where it is the headline, with its pointwise interval elsewhere."""
    line = _line(rows, column, column, colour)
    ends = _column(rows, f"{column}_lower")
    # The embedding is decided everywhere it is equal in both models: it must not name the whole curve.
    shown = (np.isfinite(line.y) | np.isfinite(ends)) & (_column(rows, "layer") >= 0)
    kind = "pointwise" if not headline[shown].any() else "band"
    mixed = ", pointwise where controls are few" if kind == "band" and not headline[shown].all() else ""
    lower = np.where(headline, _column(rows, "band_lower"), _column(rows, f"{column}_lower"))
    upper = np.where(headline, _column(rows, "band_upper"), _column(rows, f"{column}_upper"))
    # Beside a headline `specific` the plain attenuation is a second look: its few simultaneous layers need no word.
    return Line(f"{column} ({kind}{mixed if column == 'specific' else ''})", line.y, lower, upper, colour)


# How well probes read a concept: axis title, chance, range shown.
READINGS = {
    "auroc": ("AUROC", 0.5, (0.35, 1.03)),
    "correlation": ("correlation\nwith the grade", 0.0, (-0.35, 1.05)),
}


def _sheet(
    frame: pd.DataFrame, onset: pd.DataFrame | None, concept: str, template: str, site: str,
    planted: dict[str, Any] | None, margin: float, margin_specific: float | None,
) -> Sheet:  # fmt: skip
    here = frame[(frame["concept"] == concept) & (frame["template"] == template)]
    strength = here[(here["site"] == site) & (here["measure"] == "strength")].sort_values("layer")
    readings = here[here["measure"].isin(READINGS)]
    reading = readings[readings["site"] == site].set_index("layer").reindex(strength["layer"])
    if strength.empty:
        known = [str(c) for c in frame["concept"].unique()]
        measured = frame.loc[
            (frame["concept"] == concept) & (frame["measure"] == "strength"), ["template", "site"]
        ]
        places = [f"{t} at {s}" for t, s in measured.drop_duplicates().itertuples(index=False)]
        raise InputError(
            f"no strength rows for concept {concept!r}, template {template!r}, site {site!r}; expected "
            f"one of {', '.join(places or known[:12])}; choose among those"
        )
    panels = []
    if np.isfinite(_column(strength, "base")).any():
        pair = (_line(strength, "base", "base", BLUE), _line(strength, "aligned", "aligned", VERMILLION))
        panels.append(Panel("How loud (pointwise 95 %)", "strength\n(rms of stream)", pair))
    span = _onset_span(onset, concept, template, site)
    panels.append(_attenuation_panel(strength, concept, planted, margin, margin_specific, span))
    if len(reading) and np.isfinite(_column(reading, "base")).any():
        pair = (_line(reading, "base", "base", BLUE), _line(reading, "aligned", "aligned", VERMILLION))
        axis, chance, ends = READINGS[str(reading["measure"].iloc[0])]
        floor = readings[readings["site"] == "text"]
        marks = [(chance, "chance", GREY, "dot")]
        if len(floor) and np.isfinite(_column(floor, "base")[0]):
            marks.append((float(_column(floor, "base")[0]), "lexical floor", ORANGE, "dash"))
        panels.append(Panel("Is it there at all (pointwise 95 %)", axis, pair, tuple(marks), None, ends))
    n = _column(strength, "n_scenarios")
    counted = f"n = {np.nanmax(n):.0f} scenarios" if np.isfinite(n).any() else "n not recorded"
    layers = _column(strength, "layer")
    return Sheet(
        f"{concept} · {template} · {site} · {counted}", layers, _column(strength, "depth"), tuple(panels)
    )


def _attenuation_panel(
    rows: pd.DataFrame, concept: str, planted: dict[str, Any] | None, margin: float, margin_specific: float | None,
    span: tuple[float, float] | None,
) -> Panel:  # fmt: skip
    about = about_specific(rows)
    has_specific = bool(np.isfinite(_column(rows, "specific")).any())
    lines = [_quantity(rows, "attenuation", ~about, GREY if has_specific else BLACK)]
    if has_specific:
        lines.append(_quantity(rows, "specific", about, GREEN))
    if planted and planted.get("concept") == concept and planted.get("attenuation_by_layer"):
        truth = {int(layer): value for layer, value in planted["attenuation_by_layer"].items()}
        y = np.array([float(truth.get(int(layer), np.nan)) for layer in _column(rows, "layer")])
        lines.append(Line("planted truth", y, None, None, PURPLE, "dash"))
    marks = [
        (0.0, "", GREY, "solid"),
        (margin, f"margin ±{margin:g}", GREY, "dot"),
        (-margin, "", GREY, "dot"),
    ]
    if has_specific and margin_specific not in (None, margin):
        marks += [(margin_specific, f"equivalence of specific ±{margin_specific:g}", GREEN, "dot")]
        marks += [(-margin_specific, "", GREEN, "dot")]
    ends = np.concatenate([a for s in lines for a in (s.y, s.lower, s.upper) if a is not None])
    ends = ends[np.isfinite(ends)]
    # One noisy amplified layer can reach −5 and flatten all others: the axis stops at −1.2, and says so.
    low = max(float(ends.min(initial=-0.3)) - 0.08, -1.2)
    high = min(float(ends.max(initial=0.3)) + 0.08, 1.05)
    cut = "axis cut at −1.2" if ends.size and ends.min() < -1.2 else "95 %"
    unit = "attenuation\n(1 = gone)"
    return Panel(f"How much is lost ({cut})", unit, tuple(lines), tuple(marks), span, (low, high))


def _onset_span(
    onset: pd.DataFrame | None, concept: str, template: str, site: str
) -> tuple[float, float] | None:
    if onset is None or onset.empty:
        return None
    same = (onset["concept"] == concept) & (onset["template"] == template) & (onset["site"] == site)
    rows = onset[same & (onset["measure"] == "strength")]
    if rows.empty:
        return None
    first, last = _column(rows, "onset_lower")[0], _column(rows, "onset_upper")[0]
    return (float(first), float(last)) if np.isfinite(first) and np.isfinite(last) else None


def _grid(
    frame: pd.DataFrame, template: str, site: str, concepts: dict[str, Any], roles: tuple[str, ...]
) -> Grid:
    same = (frame["template"] == template) & (frame["site"] == site) & (frame["measure"] == "strength")
    rows = frame[same & frame["role"].isin(roles)]
    if rows.empty:
        raise InputError(
            f"no strength rows for template {template!r}, site {site!r}, roles {roles}; choose others"
        )
    layers = np.unique(_column(rows, "layer"))
    blocks: dict[tuple[int, str], list[tuple[tuple[bool, float], str, list[Any]]]] = {}
    for name, part in ((str(k), v) for k, v in rows.groupby("concept", sort=True)):
        role = str(part["role"].iloc[0])
        mechanism = str(concepts.get(name, {}).get("mechanism") or "targets")
        block = (roles.index(role), "controls" if role == "control" else mechanism)
        cells = [_cell(part[_column(part, "layer") == layer]) for layer in layers]
        found = [c[0] for c in cells if np.isfinite(c[0])]
        decided = any(c[1] == "●" for c in cells)
        blocks.setdefault(block, []).append(((not decided, -max(found, default=-np.inf)), name, cells))
    ordered = [(block, sorted(part, key=lambda r: r[:2])) for block, part in blocks.items()]
    ordered.sort(key=lambda item: (item[0][0], item[1][0][0], item[0][1]))  # role, worst member, name
    flat = [row for _, part in ordered for row in part]
    return Grid(
        caption=f"{template} · {site} · specific where controls allow, else attenuation",
        names=tuple(r[1] for r in flat),
        groups=tuple((block[1].replace("_", " "), len(part)) for block, part in ordered),
        layers=layers,
        values=np.array([[c[0] for c in r[2]] for r in flat]),
        marks=tuple(tuple(c[1] for c in r[2]) for r in flat),
        hover=tuple(tuple(c[2] for c in r[2]) for r in flat),
    )


def _cell(rows: pd.DataFrame) -> tuple[float, str, str]:
    """Value, mark and hover text of one concept at one layer."""
    if rows.empty:
        return np.nan, "–", "not measured"
    name = "specific" if about_specific(rows)[0] else "attenuation"
    value = _column(rows, name)[0]
    lower, upper = _column(rows, "band_lower")[0], _column(rows, "band_upper")[0]
    decision, flags = (
        ("" if pd.isna(v) else str(v)) for v in (rows["decision"].iloc[0], rows["flags"].iloc[0])
    )
    mark = {"attenuated": "●", "amplified": "▲", "equivalent": "="}.get(decision, "")
    if not np.isfinite(value) and np.isfinite(lower):
        # Only a bound is known: the cell has the colour of the bound and says so.
        return lower, mark or "≥", f"{name} at least {lower:.2f}<br>{escape(decision)} {escape(flags)}"
    if not np.isfinite(value):
        return np.nan, "–", f"blank: {escape(flags) or 'not defined'}"
    band = f" [{lower:.2f}, {upper:.2f}]" if np.isfinite(lower) and np.isfinite(upper) else ""
    return value, mark, f"{name} {value:.2f}{band}<br>{escape(decision)} {escape(flags)}"
