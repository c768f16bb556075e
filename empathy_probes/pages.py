"""What the pages are made of: figures, sections, escaping and embedding.

Every figure is on a page twice: drawn by plotly for the screen, and as an SVG image for print, for browsers without scripts and
for readers of the source. All text is escaped, and a content security policy allows the page's own scripts and no connection.
"""

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, runtime_checkable

import jinja2
import pandas as pd
from markupsafe import Markup

from empathy_probes import tables, wording
from empathy_probes.drawing import svg


@runtime_checkable
class Tables(Protocol):
    """What the report reads of a study."""

    @property
    def name(self) -> str:
        """Title."""

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Versions, models, concepts, options, headlines: plain data."""

    @property
    def tables(self) -> Mapping[str, pd.DataFrame]:
        """The contract's tables by file stem."""

    def result(self, key: str) -> Any:
        """What a table was made from, or None."""


@dataclass(frozen=True)
class Picture:
    """One figure of the page."""

    id: str
    """Fixed id of its element."""
    alt: str
    """What a reader who cannot see it is told."""
    caption: str
    """Below it: what, where, n."""
    image: str
    """SVG as a data URI; inside an image, no script of an SVG ever runs."""
    data: Markup
    """The plotly figure as JSON that is safe inside a script element."""
    height: int
    """Height of the plotly figure in pixels."""
    legend: tuple[tuple[str, str, str], ...]
    """Name, colour and dash of every curve: as text, because a legend of plotly's does not fit on a phone."""


@dataclass(frozen=True)
class Section:
    """One section of the page."""

    id: str
    """Anchor."""
    title: str
    """Heading."""
    body: Markup
    """Content."""
    entries: tuple[tuple[str, str], ...] = ()
    """Anchors and names of what the table of contents lists below it."""


def make_picture(name: str, alt: str, caption: str, static: Any, live: Any) -> Picture:
    """A figure of the page from both drawings of it; without a live one it is a picture only."""
    image = image_uri(svg(static))
    if live is None:
        return Picture(name, alt, caption, image, Markup(""), 0, ())
    legend = [
        (t.name, t.line.color or t.marker.color, t.line.dash or "solid")
        if t.type == "scatter"
        else (t.name, t.marker.color, "area")
        for t in live.data
        if t.type in ("scatter", "bar") and t.showlegend
    ]
    legend += [(shape.name, shape.fillcolor, "area") for shape in live.layout.shapes if shape.showlegend]
    if legend:
        live.update_layout(showlegend=False, margin_b=48, height=live.layout.height - 36)
    return Picture(
        name, alt, caption, image, escape_json(live.to_json()), int(live.layout.height), tuple(legend)
    )  # fmt: skip


def plain_table(name: str) -> Callable[[Tables], list[Section]]:
    """Any table that has no section of its own is shown as it is."""

    def section(study: Tables) -> list[Section]:
        body = parts().table(name, *head_and_rows(study.tables[name]))
        return [Section(slug(name), name.replace("_", " ").capitalize(), body)]

    return section


def head_and_rows(frame: pd.DataFrame) -> tuple[list[str], list[list[tables.Cell]]]:
    return tables.table_head(frame), tables.table_rows(frame)


# ---- escaping and embedding -------------------------------------------------------------------------------


def escape_json(text: str) -> Markup:
    """JSON that cannot end its script element: `<`, `>` and `&` as escapes, which mean the same in JSON."""
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def image_uri(image: str) -> str:
    """An SVG as a data URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(image.encode()).decode()


def script_hash(script: str) -> str:
    """What the content security policy knows a script by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", str(text).lower()).strip("-") or "x"


@cache
def plotly_js() -> str:
    """The plotly library, which the page carries once."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


@cache
def environment() -> jinja2.Environment:
    """Where the page templates are."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("empathy_probes"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.globals["explain"] = wording.explain
    made.globals["glossary"] = wording.FLAGS
    made.filters["plain"] = wording.plain
    return made


def template_text(name: str) -> str:
    """A template, script or style sheet as it stands."""
    loader = environment().loader
    assert loader is not None  # set three lines above
    return loader.get_source(environment(), name)[0]


def parts() -> Any:
    return environment().get_template("parts.html.j2").module
