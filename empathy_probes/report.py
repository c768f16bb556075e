"""A study as one HTML file that opens anywhere, offline.

The page is made from the saved tables and the manifest alone, and from nothing that changes between two runs (no
clock, no random ids), so the same study gives the same bytes.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from empathy_probes import plots, tables, wording
from empathy_probes.drawing import svg
from empathy_probes.effects import EFFECTS, effect_section
from empathy_probes.ledger import layer_name
from empathy_probes.metrics import describe_metric
from empathy_probes.pages import (
    Picture,
    Section,
    Tables,
    environment,
    head_and_rows,
    image_uri,
    make_picture,
    parts,
    plain_table,
    plotly_js,
    script_hash,
    slug,
    template_text,
)
from empathy_probes.scorecard import load_scorecard
from empathy_probes.store import write_file


def render_report(study: Tables) -> str:
    """The report of a study as HTML; equal studies give equal text.

    Args:
        study: anything with `name`, `manifest` and `tables`.
    """
    sections = [
        section for name in _table_names(study) for section in SECTIONS.get(name, plain_table(name))(study)
    ]
    script = template_text("report.js")
    scripts = (plotly_js(), script)
    flags = sorted({f for frame in study.tables.values() if "flags" in frame for v in frame["flags"].unique() for f in
                    wording.split_flags(v)})  # fmt: skip
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            study=study,
            manifest=study.manifest,
            headlines=_cards(study),
            counts=Counter(card["title"] for card in _cards(study)).items(),
            planted=_phantom(study),
            overview=_overview(study, ("target", "control")),
            sections=sections,
            used_flags=flags,
            models=_models(study.manifest),
            known=_known_pairs(),
            scripts=[Markup(s) for s in scripts],
            hashes=[script_hash(s) for s in scripts],
            css=Markup(template_text("report.css")),
            record=json.dumps(study.manifest, indent=1, ensure_ascii=False, default=str),
        )
    )


def write_report(study: Tables, path: str | Path = "report.html") -> Path:
    """Write the report whole or not at all.

    Args:
        study: anything with `name`, `manifest` and `tables`.
        path: the file, or a folder to write `report.html` into.

    Raises:
        InputError: the place cannot be written.
    """
    path = Path(path)
    if path.is_dir() or path.suffix.lower() not in (".html", ".htm"):
        path = path / "report.html"
    write_file(path, render_report(study).encode())
    return path


def result_html(result: Any) -> str:
    """What a notebook shows of a result: its figure as an image and its rows as a table.

    Args:
        result: anything with `key` and `to_frame()`.
    """
    frame = result.to_frame()
    if result.key == "attenuation":
        frame = frame[(frame["measure"] == "strength") & (frame["role"] == "target")]
    image = image_uri(svg(plots.plot(result)))
    return str(parts().notebook(image, tables.table_rows(frame), tables.table_head(frame), result.key))


# ---- sections, one entry per table ------------------------------------------------------------------------


def _concepts(study: Tables) -> list[Section]:
    """One section per mechanism with its target concepts, then the controls and all rows."""
    frame, concepts = study.tables["attenuation"], study.manifest.get("concepts", {})
    groups: dict[str, list[dict[str, Any]]] = {}
    for card in _cards(study):
        mechanism = str(concepts.get(card["concept"], {}).get("mechanism") or "other targets")
        groups.setdefault(mechanism, []).append(card)
    sections = []
    for mechanism, cards in groups.items():
        body = Markup("").join(_concept(study, card) for card in cards)
        entries = tuple((card["anchor"], card["concept"]) for card in cards)
        sections.append(
            Section(f"mechanism-{slug(mechanism)}", mechanism.replace("_", " ").capitalize(), body, entries)
        )
    controls = frame[frame["role"] == "control"]
    body = parts().controls(tables.control_rows(controls, _primary(study)), tables.CONTROL_HEAD)
    sections.append(Section("controls", "Controls", body))
    sections.append(Section("rows", "All rows", parts().table("attenuation", *head_and_rows(frame))))
    return sections


def _concept(study: Tables, card: dict[str, Any]) -> Markup:
    frame = study.tables["attenuation"]
    mine = frame[frame["concept"] == card["concept"]]
    places = [
        (str(t), str(s)) for t, s in mine[["template", "site"]].drop_duplicates().itertuples(index=False)
    ]
    places = [p for p in places if p[0] != "did" and p[1] != "text"]
    places.sort(key=lambda p: (p != (card["template"], card["site"]), p))
    pictures = [_picture(study, card, template, site) for template, site in places]
    did = mine[(mine["template"] == "did") & (mine["measure"] == "strength")]
    here = mine[(mine["template"] == card["template"]) & (mine["site"].isin([card["site"], "text"]))]
    return parts().concept(
        card, study.manifest.get("concepts", {}).get(card["concept"], {}), pictures, tables.flag_list(here),
        tables.did_rows(did), tables.view_rows(here, card["headline"].get("layer")), tables.VIEW_HEAD,
        layer_name(card["headline"]["layer"]) if not wording.missing(card["headline"].get("layer")) else "",
        _missed_by_map(study, card),
    )  # fmt: skip


def _missed_by_map(study: Tables, card: dict[str, Any]) -> str:
    """Share of neutral variance that the map between the models misses at the headline's layer; empty where it is not known."""
    finding, layer = study.result("attenuation"), card["headline"].get("layer")
    if finding is None or wording.missing(layer):
        return ""
    (m,) = (m for m in finding.select(card["template"], card["site"]) if m.concept == card["concept"])
    return f"{100 * m.views.map_error[m.layers.index(layer)]:.0f} %"


def _ledger(study: Tables) -> list[Section]:
    frame = study.tables["ledger"].dropna(axis="columns", how="all")
    head, rows = head_and_rows(frame)
    # Names of verdicts, stages and mechanisms are read here, not parsed; the concept keeps its exact name.
    rows = [[name, *(replace(cell, text=_in_words(cell.text)) for cell in row)] for name, *row in rows]
    return [Section("ledger", "Verdicts", parts().ledger(head, rows))]


def _summary(study: Tables) -> list[Section]:
    """One row per mechanism and dimension; nothing where concepts have neither."""
    frame = study.tables["summary"]
    if frame.empty:
        return []
    shown = frame.assign(group=frame["group"].str.replace("_", " "))
    return [Section("summary", "By mechanism and dimension", parts().summary(*head_and_rows(shown)))]


def _in_words(name: str) -> str:
    """`not_run` on one line, longer names where they fit."""
    return name.replace("_", "\u00a0" if len(name) < 10 else " ").replace(";", ", ")


SECTIONS: dict[str, Callable[[Tables], list[Section]]] = {
    "summary": _summary,
    "ledger": _ledger,
    **{key: partial(effect_section, key) for key in EFFECTS},
    "onset": lambda study: [],  # said in the cards and shaded in the figures; the table itself is in onset.csv
    "attenuation": _concepts,
}
"""Table name → its sections, in the order of the page; later tables add one entry each."""


def _table_names(study: Tables) -> list[str]:
    known = [name for name in SECTIONS if name in study.tables]
    return [*known, *sorted(set(study.tables) - set(known))]


# ---- what the sections are made of ------------------------------------------------------------------------


def _cards(study: Tables) -> list[dict[str, Any]]:
    """One card per target concept, worst first; other templates and sites of it are listed below its headline."""
    by_concept: dict[str, list[dict[str, Any]]] = {}
    for headline in study.manifest.get("headlines", []):
        by_concept.setdefault(str(headline["concept"]), []).append(headline)
    chosen, order = _primary(study), {"shared": 0, "raw": 1, "own": 2}
    cards = []
    for found in by_concept.values():
        ranked = sorted(
            found, key=lambda h: ((h["template"], h["site"]) != chosen, order.get(h["template"], 9))
        )
        cards.append(
            wording.card(ranked[0], ranked[1:], study.manifest.get("options", {}), _n_controls(study))
        )
    cards.sort(key=lambda c: (c["rank"], c["concept"]))
    for i, card in enumerate(cards):
        card["anchor"] = f"concept-{i}-{slug(card['concept'])}"
    return cards


def _n_controls(study: Tables) -> int:
    frame = study.tables["attenuation"]
    return int(frame.loc[frame["role"] == "control", "concept"].nunique())


def _primary(study: Tables) -> tuple[str, str]:
    """Template and site of the headlines."""
    frame = study.tables["attenuation"]
    sites = [str(s) for s in frame["site"].dropna().unique() if s != "text"]
    return plots.headline_template(frame), sites[0] if sites else "resid_post"


def _picture(study: Tables, card: dict[str, Any], template: str, site: str) -> Picture:
    options = study.manifest.get("options", {})
    margin, specific = wording.margins(options)
    arguments: dict[str, Any] = {
        "template": template, "site": site, "planted": study.manifest.get("planted"), "margin": margin,
        "margin_specific": specific,
    }  # fmt: skip
    shown = (study.tables["attenuation"], study.tables.get("onset"), card["concept"])
    alt = f"{card['concept']}, {template}, {site}, by layer: strength in both models, attenuation with its band, AUROC"
    if (template, site) == (card["template"], card["site"]):
        alt += f". {card['sentence']}"
    name = f"figure-{card['anchor']}-{slug(template)}-{slug(site)}"
    caption = f"{card['concept']} · {wording.TEMPLATES.get(template, template)} · {site} · n = {card['n']} scenarios"
    return make_picture(
        name,
        alt,
        caption,
        plots.attenuation_figure(*shown, **arguments),
        plots.attenuation_plotly(*shown, **arguments),
    )


def _overview(study: Tables, roles: tuple[str, ...]) -> Picture:
    template, site = _primary(study)
    arguments: dict[str, Any] = {
        "template": template, "site": site, "concepts": study.manifest.get("concepts", {}), "roles": roles,
    }  # fmt: skip
    frame = study.tables["attenuation"]
    alt = "Heat map of the headline quantity of every concept at every layer; the numbers are in the table of all rows"
    caption = (
        f"Every concept at every layer ({wording.TEMPLATES.get(template, template)}, {site}): attenuation beyond the "
        "controls where there are enough of them, plain attenuation otherwise. Worst first in each group. "
        "1 is gone, below 0 is amplified. ● attenuated, ▲ amplified, = equivalent, ≥ at least so much, – blank; no mark: not "
        "decided."
    )
    figures = plots.overview_figure(frame, **arguments), plots.overview_plotly(frame, **arguments)
    return make_picture("figure-overview", alt, caption, *figures)


def _phantom(study: Tables) -> dict[str, Any] | None:
    planted = study.manifest.get("planted")
    return wording.planted_and_found(planted, _cards(study)) if planted else None


@cache
def _known_pairs() -> dict[str, Any]:
    """The shipped scorecard: a row per metric, a column per n."""
    card = load_scorecard()
    frame = card.summary()
    sizes = sorted(int(n) for n in frame["n"].unique())
    rows = []
    for (metric, target), cells in frame.groupby(["metric", "target"], sort=False):
        by_size = {int(row["n"]): row for row in cells.to_dict("records")}
        shown = [f"{by_size[n]['median']:.2f} ({by_size[n]['smallest']:.2f} to {by_size[n]['largest']:.2f})"
                 if n in by_size else "–" for n in sizes]  # fmt: skip
        rows.append(
            (
                str(metric).replace("_", " "),
                shown,
                str(target),
                int(cells["met"].sum()),
                int(cells["cells"].sum()),
            )
        )
    judged = [row for row in card.rows if row.met is not None]
    return {
        "sizes": sizes, "rows": rows, "words": [(m.replace("_", " "), describe_metric(m)) for m in frame["metric"].unique()], "pairs": card.provenance["pairs"], "redraws": card.provenance["redraws"],
        "met": len(judged) - len(card.missed), "judged": len(judged),
        "wide": len(card.too_wide),
        "missed": len(card.missed),
    }  # fmt: skip


def _models(manifest: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Base beside aligned, one row per property."""
    sides = [manifest.get("base", {}), manifest.get("aligned", {})]
    keys = list(dict.fromkeys(key for side in sides for key in side))
    base, aligned = sides
    return [
        (key.replace("_", " "), wording.plain(base.get(key)), wording.plain(aligned.get(key))) for key in keys
    ]
