"""The report: one file that opens anywhere, says what was found, and never shows a number that is not there."""

import ast
import base64
import fcntl
import html
import json
import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest

from empathy_probes import pages, plots, report, tables
from empathy_probes.errors import InputError
from empathy_probes.pages import parts
from empathy_probes.tables import Cell

LAYERS = list(range(-1, 8))
MARGIN = 0.1
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@dataclass(frozen=True)
class Study:
    """The attributes of a study that the report reads."""

    name: str
    manifest: dict[str, Any]
    tables: dict[str, pd.DataFrame]

    def result(self, key: str) -> None:
        """There are tables only."""


TARGETS = {
    "valence": ("sentiment_attenuation", "attenuated"),
    "warmth": ("linguistic_distancing", "inconclusive"),
    "hedging": ("conflict_avoidance", "equivalent"),
}
CONTROLS = ("tense", "number", "weather", "transport", "colour", "kitchen", "garden", "sport")


def _attenuation_rows(name: str, role: str, kind: str, template: str, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rows = []
    for layer in LAYERS:
        depth = (layer + 1) / 8
        base = 0.15 + 0.5 * depth + rng.normal(0, 0.01)
        lost = (0.62 if layer >= 3 else 0.0) if kind == "attenuated" else 0.0
        lost += float(rng.normal(0, 0.015)) if layer >= 0 else 0.0
        width = {"inconclusive": 0.32, "attenuated": 0.09}.get(kind, 0.06)
        row: dict[str, Any] = {
            "concept": name, "role": role, "template": template, "site": "resid_post", "layer": layer, "depth": depth,
            "measure": "strength", "n_scenarios": 80, "base": base, "base_lower": base - 0.04,
            "base_upper": base + 0.04, "aligned": base * (1 - lost), "aligned_lower": base * (1 - lost) - 0.04,
            "aligned_upper": base * (1 - lost) + 0.04, "difference": -base * lost,
            "difference_lower": -base * lost - 0.03, "difference_upper": -base * lost + 0.03, "attenuation": lost,
            "attenuation_lower": lost - width / 1.6, "attenuation_upper": lost + width / 1.6,
            "band_lower": lost - width, "band_upper": lost + width, "p_adjusted": 0.001 if lost > 0.3 else 0.8,
            "decision": "attenuated" if lost > 0.3 else kind if kind != "attenuated" else "inconclusive", "flags": "",
        }  # fmt: skip
        if role == "target":
            row |= {"specific": lost, "specific_lower": lost - width, "specific_upper": lost + width}
        if kind == "inconclusive" and layer <= 1:
            blank = [c for c in row if c.startswith(("attenuation", "specific", "band", "p_adj"))]
            row |= dict.fromkeys(blank, np.nan) | {"decision": None, "flags": "base_not_detected;small_n"}
        rows.append(row)
        auc = 0.6 + 0.38 * depth
        rows.append({
            "concept": name, "role": role, "template": template, "site": "resid_post", "layer": layer, "depth": depth,
            "measure": "auroc", "n_scenarios": 80, "base": auc, "base_lower": auc - 0.05,
            "base_upper": min(auc + 0.05, 1), "aligned": auc - 0.02, "aligned_lower": auc - 0.07,
            "aligned_upper": auc + 0.01, "difference": -0.02, "difference_lower": -0.05, "difference_upper": 0.01,
            "decision": None, "flags": "ceiling" if auc > 0.97 else "",
        })  # fmt: skip
    rows.append({
        "concept": name, "role": role, "template": template, "site": "text", "layer": np.nan, "depth": np.nan,
        "measure": "auroc", "n_scenarios": 80, "base": 0.66, "base_lower": 0.6, "base_upper": 0.72, "aligned": 0.66,
        "aligned_lower": 0.6, "aligned_upper": 0.72, "difference": 0.0, "decision": None, "flags": "lexical_floor",
    })  # fmt: skip
    return rows


def _headline(name: str, kind: str, template: str) -> dict[str, Any]:
    common = {
        "concept": name, "role": "target", "template": template, "site": "resid_post", "decision": kind,
        "onset_lower": None, "onset_upper": None, "peak_lower": None, "peak_upper": None, "layer": 7,
        "quantity": "specific", "n_scenarios": 80, "scenarios_needed": None, "minimum_detectable": 0.17, "flags": "",
    }  # fmt: skip
    if kind == "attenuated":
        return common | {
            "onset_lower": 2, "onset_upper": 3, "peak_lower": 3, "peak_upper": 7, "layer": 4, "size": 0.62,
            "size_lower": 0.53, "size_upper": 0.71,
            "sentence": f"{name} is attenuated by layer 3 and could begin as early as layer 2.",
        }  # fmt: skip
    if kind == "inconclusive":
        return common | {
            "size": None, "size_lower": None, "size_upper": None, "scenarios_needed": 310, "minimum_detectable": 0.41,
            "flags": "base_not_detected;small_n", "layer": None, "sentence": f"Nothing can be said about {name}.",
        }  # fmt: skip
    return common | {
        "size": 0.01,
        "size_lower": -0.05,
        "size_upper": 0.07,
        "sentence": f"{name} is preserved.",
    }


def _manifest(targets: dict[str, tuple[str, str]], templates: tuple[str, ...]) -> dict[str, Any]:
    model = {
        "revision": "main", "weights": "3f" * 32, "tokenizer": "a1" * 32, "chat_template": "b2" * 32, "n_layers": 8,
        "architecture": "LlamaForCausalLM", "d_model": 128, "dtype": "float32", "parameters": 3_400_000,
    }  # fmt: skip
    common = {"dimension": "relational", "speaker": "user", "read": "last", "n_scenarios": 80, "n_texts": 160}
    labels = {"1": "the state is pleasant", "0": "the state is unpleasant"}
    entries: dict[str, Any] = {}
    for name in [*targets, *CONTROLS]:
        mechanism = targets[name][0] if name in targets else None
        entries[name] = common | {
            "role": "target" if name in targets else "control", "mechanism": mechanism, "digest": "c3" * 32,
            "labels": labels, "description": f"How far {name} is expressed by the speaker.",
        }  # fmt: skip
    return {
        "package": {"name": "empathy_probes", "version": "0.1.0"},
        "versions": {"python": "3.11.4", "torch": "2.13.0", "transformer_lens": "4.3.0"},
        "base": model | {"name": "tiny-base"}, "aligned": model | {"name": "tiny-aligned"}, "concepts": entries,
        "options": {"margin": MARGIN, "margin_specific": 0.2, "draws": 999, "seed": 0, "template": "both",
                    "sites": ["resid_post"], "layers": "all", "dtype": "float32", "device": "cpu"},
        "planted": None, "notes": ["The aligned model has no system prompt in its template."],
        "headlines": [_headline(n, kind, t) for n, (_, kind) in targets.items() for t in templates],
    }  # fmt: skip


def make_study(
    targets: dict[str, tuple[str, str]] | None = None, templates: tuple[str, ...] = ("raw", "shared")
) -> Study:
    """A study as `study` writes it: 8 blocks, one target attenuated from block 3 on, one undecided, one preserved."""
    targets = targets or TARGETS
    rows: list[dict[str, Any]] = []
    for seed, (name, (_, kind)) in enumerate(targets.items()):
        for template in templates:
            rows += _attenuation_rows(name, "target", kind, template, seed)
    for seed, name in enumerate(CONTROLS, start=100):
        for template in templates:
            rows += _attenuation_rows(name, "control", "equivalent", template, seed)
    onset = [
        {"concept": h["concept"], "template": h["template"], "site": "resid_post", "measure": "strength",
         "onset_lower": h["onset_lower"], "onset_upper": h["onset_upper"], "peak_layer": h["layer"],
         "peak_lower": h["peak_lower"], "peak_upper": h["peak_upper"], "flags": h["flags"]}
        for h in (_headline(n, kind, t) for n, (_, kind) in targets.items() for t in templates)
    ]  # fmt: skip
    ledger = [
        {"concept": n, "role": "target", "mechanism": m, "dimension": "relational", "encode": kind, "use": "not_run",
         "express": "not_run", "verdict": "inconclusive", "onset_lower": np.nan, "onset_upper": np.nan, "size": np.nan,
         "size_lower": np.nan, "size_upper": np.nan, "missing": "use, express", "scenarios_needed": np.nan}
        for n, (m, kind) in targets.items()
    ]  # fmt: skip
    tables = {"attenuation": pd.DataFrame(rows), "onset": pd.DataFrame(onset), "ledger": pd.DataFrame(ledger)}
    return Study("tiny pair", _manifest(targets, templates), tables)


def make_small() -> Study:
    """One target, one template: what a test needs that renders a whole report of its own."""
    return make_study({"valence": TARGETS["valence"]}, templates=("raw",))


def make_phantom(study: Study | None = None) -> Study:
    """The same study, of a pair whose difference was planted."""
    study = study or make_study()
    truth = {
        "schema_version": 1, "family": "planted", "concept": "valence", "layer": 3, "keep_intended": 0.4,
        "keep_achieved": 0.385, "attenuation_by_layer": {str(block): 0.615 * (block > 2) for block in range(-1, 8)}, "n_scenarios": 2000, "seed": 0,
        "positions": "all", "verdict": "erased",
    }  # fmt: skip
    return replace(study, manifest=study.manifest | {"planted": truth})


class Page:
    """A page in headless Chromium, spoken to over a pipe: no port, no download, a new profile each time."""

    def __init__(self, folder: Path) -> None:
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # The browser expects its pipe at 3 and 4; high numbers cannot be overwritten while these are set.
        inner = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (to_read, to_write)]
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
            "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
        )
        command = f"exec {CHROMIUM} {flags} --user-data-dir={folder} 3<&{inner[0]} 4>&{inner[1]}"
        self.process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=inner, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for fd in (to_read, to_write, *inner):
            os.close(fd)
        self._buffer, self._count, self.session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command, gather the events on the way, return the answer."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], 120)[0]:
                raise TimeoutError("the browser does not answer")
            self._buffer += os.read(self._read, 1 << 20)
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def open(self, path: Path, width: int, height: int, *, mobile: bool = False) -> None:
        """Open a file at a window size and wait until the figures in the window are drawn."""
        self.events.clear()
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )
        self.ask("Emulation.setTouchEmulationEnabled", enabled=mobile)
        self.ask("Page.navigate", url=path.as_uri())
        drawn = """document.readyState == 'complete' && !!document.querySelector('#overview') &&
            (document.querySelector('#overview').scrollIntoView({behavior: 'instant'}),
             !!document.querySelector('#overview .main-svg'))"""
        for _ in range(600):
            if self.run(drawn):
                break
            select.select([], [], [], 0.1)
        else:
            raise TimeoutError("no figure was drawn")

    def run(self, expression: str) -> Any:
        """Evaluate an expression in the page, promises awaited."""
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def requests(self) -> list[str]:
        """Every address asked for that is not in the file itself."""
        sent = [
            e["params"]["request"]["url"]
            for e in self.events
            if e.get("method") == "Network.requestWillBeSent"
        ]
        return [url for url in sent if not url.startswith(("data:", "blob:"))]

    def complaints(self) -> list[str]:
        """Exceptions, console errors and log entries (violations of the security policy among them)."""
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        return [json.dumps(e["params"])[:500] for e in self.events if e.get("method") in kinds]

    def close(self) -> None:
        self.session = ""
        self.ask("Browser.close")
        self.process.wait(30)
        os.close(self._write)
        os.close(self._read)


@pytest.fixture(scope="module")
def rendered() -> str:
    return report.render_report(make_phantom())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    opened = Page(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def _without_scripts(text: str) -> str:
    """What a reader sees: no scripts, styles, tags or embedded images."""
    text = re.sub(r"<(script|style)\b.*?</\1>", " ", text, flags=re.S)
    return html.unescape(re.sub(r"<[^>]*>", " ", text))


def _pictures(text: str) -> list[str]:
    return [base64.b64decode(d).decode() for d in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", text)]


@pytest.fixture(scope="module")
def small() -> str:
    return report.render_report(make_small())


def test_the_same_study_gives_the_same_bytes(small: str) -> None:
    assert report.render_report(make_small()) == small


def test_another_process_with_another_hash_seed_gives_the_same_bytes(small: str, tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_report; from empathy_probes import report; "
        "report.write_report(test_report.make_small(), sys.argv[2])"
    )
    out = tmp_path / "again.html"
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(out)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"})
    assert out.read_text(encoding="utf8") == small


def test_a_changed_number_changes_the_report(small: str) -> None:
    study = make_small()
    study.tables["attenuation"].loc[0, "base"] += 0.1
    assert report.render_report(study) != small


def test_settings_of_the_user_do_not_reach_the_figures_and_stay_as_they_were(small: str) -> None:
    with matplotlib.rc_context({"font.size": 31, "svg.fonttype": "path", "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        assert report.render_report(make_small()) == small
        assert dict(matplotlib.rcParams) == before


def test_no_reader_ever_sees_nan_or_none(rendered: str) -> None:
    shown = [_without_scripts(rendered), *(re.sub(r"<[^>]*>", " ", p) for p in _pictures(rendered))]
    for text in shown:
        found = re.search(r"\b(nan|NaN|None|NaT|<NA>|inf)\b", text)
        assert found is None, text[max(found.start() - 60, 0) : found.end() + 60]
    for data in re.findall(r'type="application/json"[^>]*>(.*?)</script>', rendered, flags=re.S):
        json.loads(data, parse_constant=pytest.fail)


def test_integer_columns_with_missing_values_are_read_like_others(small: str) -> None:
    study = make_small()
    frames = {name: frame.copy() for name, frame in study.tables.items()}
    frames["attenuation"]["layer"] = frames["attenuation"]["layer"].astype("Int64")
    for column in ("onset_lower", "onset_upper", "peak_layer"):
        frames["onset"][column] = frames["onset"][column].astype("Int64")
    assert report.render_report(replace(study, tables=frames)) == small


def test_a_blank_cell_says_why(rendered: str) -> None:
    why = html.escape(report.wording.FLAGS["base_not_detected"])
    assert re.search(rf'<td[^>]*title="{re.escape(why)}[^"]*">–</td>', rendered)


KEEPING = {"join", "fromkeys", "tuple", "list", "set", "sorted"}  # calls that hand on the flags they get


def literals(value: ast.expr, assigned: dict[str, list[ast.expr]]) -> Iterator[str]:
    """Strings that an expression of flags may hold, also by way of variables; conditions say nothing."""
    inner: Sequence[ast.expr] = ()
    match value:
        case ast.Constant(value=str(text)) | ast.JoinedStr(values=[ast.Constant(value=str(text)), *_]):
            yield text
        case ast.Name(id=name):
            inner = assigned.pop(name, [])
        case ast.List(elts=inner) | ast.Tuple(elts=inner) | ast.Set(elts=inner):
            pass
        case ast.Starred(value=one) | ast.ListComp(elt=one) | ast.GeneratorExp(elt=one):
            inner = [one]
        case ast.IfExp(body=one, orelse=other) | ast.BinOp(left=one, right=other):
            inner = [one, other]
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=args) if name in KEEPING:
            inner = args
    for each in inner:
        yield from literals(each, assigned)


def written_flags(tree: ast.Module) -> set[str]:
    """What reaches a variable, column, argument, field or function of flags; of a family the part before its number."""
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    arguments = {name: [a.arg for a in f.args.args if a.arg != "self"] for name, f in functions.items()}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            fields = [part.target for part in node.body if isinstance(part, ast.AnnAssign)]
            arguments[node.name] = [field.id for field in fields if isinstance(field, ast.Name)]
    places = {name: names.index("flags") for name, names in arguments.items() if "flags" in names}
    found: set[str] = set()
    for function in functions.values():
        assigned: dict[str, list[ast.expr]] = {}
        flags: list[ast.expr] = [ast.Name("flags")]
        for node in ast.walk(function):
            match node:
                case (
                    ast.Assign(targets=[ast.Name(id=name)], value=value)
                    | ast.AugAssign(target=ast.Name(id=name), value=value)
                ):
                    assigned.setdefault(name, []).append(value)
                case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="append"), args=[value]):
                    assigned.setdefault(name, []).append(value)
                case ast.Assign(
                    targets=[ast.Tuple(elts=[_, ast.Name(id="flags")])],
                    value=ast.Call(func=ast.Name(id=name)),
                ):
                    returned = [r.value for r in ast.walk(functions[name]) if isinstance(r, ast.Return)]
                    flags += [both.elts[1] for both in returned if isinstance(both, ast.Tuple)]
                case ast.Dict(keys=keys, values=values):
                    named = zip(keys, values, strict=True)
                    flags += [v for k, v in named if isinstance(k, ast.Constant) and k.value == "flags"]
                case ast.Call(func=ast.Name(id="flag_layers"), args=[ast.Dict(keys=keys)]):
                    flags += [key for key in keys if key is not None]
                case ast.Call(func=ast.Name(id=name), args=args) if name in places:
                    flags += args[places[name] : places[name] + 1]
                case ast.Return(value=ast.expr() as value) if "flags" in function.name:
                    flags.append(value)
            flags += [k.value for k in getattr(node, "keywords", ()) if k.arg == "flags"]
        found |= {text for each in flags for text in literals(each, assigned) if text}
    return found


@pytest.fixture(scope="module")
def written() -> set[str]:
    """Flags that the package writes."""
    sources = Path(report.__file__).parent.glob("*.py")
    return set().union(*(written_flags(ast.parse(path.read_text(encoding="utf8"))) for path in sources))


def test_every_flag_that_is_written_has_an_explanation(written: set[str]) -> None:
    families = {flag for flag in written if flag.endswith("_")}
    assert written - families - set(report.wording.FLAGS) == set()
    assert families == {"window_"} and "3 blocks" in report.wording.explain("window_3")


def test_every_explanation_is_that_of_a_flag_that_is_written(written: set[str]) -> None:
    assert set(report.wording.FLAGS) - written == set()


def test_a_hostile_name_is_harmless_everywhere() -> None:
    name = "<script>alert(1)</script><!--$\\frac{$&"  # also no valid formula
    text = report.render_report(make_study({name: ("<b>", "attenuated")}, templates=("raw",)))
    assert "<script>alert" not in text and "<!--$" not in text and "<b>" not in _strip_script(text)
    assert text.count("<script") == 2 + text.count('<script type="application/json"')
    for picture in _pictures(text):
        assert "<script" not in picture
    assert html.escape(name) in text


def _strip_script(text: str) -> str:
    return re.sub(r"<script\b.*?</script>", "", text, flags=re.S)


def test_no_json_can_end_its_script_element() -> None:
    text = json.dumps({"name": "</script><!--&"})
    assert not set("<>&") & set(pages.escape_json(text)) and json.loads(
        pages.escape_json(text)
    ) == json.loads(text)


def test_the_largest_change_of_a_control_may_be_where_it_is_lost() -> None:
    """Where nothing may be left there is no point, and the change is at least the band's lower end."""
    row = {
        "concept": "tense",
        "template": "raw",
        "site": "resid_post",
        "measure": "strength",
        "n_scenarios": 40,
    }
    frame = pd.DataFrame(
        [
            row | {"layer": 2, "attenuation": 0.3, "band_lower": 0.2, "band_upper": 0.4, "decision": "attenuated"},
            row | {"layer": 3, "attenuation": np.nan, "band_lower": 0.8, "band_upper": 1.0, "decision": "attenuated"},
        ]
    )  # fmt: skip
    ((_, _, size, at, _),) = tables.control_rows(frame, ("raw", "resid_post"))
    assert (size.text, at.text) == ("at least 0.80", "block 3")


def test_words_alone_are_told_by_what_they_are_measured_in() -> None:
    floor = {"site": "text", "layer": None, "base": 0.6, "base_lower": 0.5, "base_upper": 0.7}
    for measure, name in (("auroc", "AUROC"), ("correlation", "correlation")):
        ((first, *_),) = tables.view_rows(pd.DataFrame([floor | {"measure": measure}]), 3)
        assert first.text == f"{name} of words alone (no model)"


def test_one_known_end_of_an_interval_is_shown_without_the_other() -> None:
    frame = pd.DataFrame({"x": [np.nan], "x_lower": [0.4], "x_upper": [np.nan], "flags": ["at_least"]})
    assert report.tables.table_rows(frame)[0][0].text == "– [0.400, –]"


def test_a_view_without_a_value_shows_what_its_interval_excludes() -> None:
    blank = dict.fromkeys(
        f"{c}{end}" for c in ("base", "aligned", "difference") for end in ("", "_lower", "_upper")
    )
    row = blank | {
        "measure": "cosine",
        "layer": 3,
        "site": "resid_post",
        "base": 1.0,
        "base_lower": 1.0,
        "base_upper": 1.0,
    }
    (cells,) = tables.view_rows(pd.DataFrame([row | {"aligned_lower": 0.3, "aligned_upper": 1.0}]), 3)
    assert [cell.text for cell in cells] == ["cosine of directions", "1.00 [1.00, 1.00]", "[0.30, 1.00]", "–"]


def test_the_page_asks_for_nothing_outside_itself(rendered: str) -> None:
    outside = re.sub(r"<script\b.*?</script>|<style\b.*?</style>", "", rendered, flags=re.S)
    links = re.findall(r"""(?:src|href|action|srcset|poster)\s*=\s*["']?([^"'\s>]+)""", outside)
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert "url(" not in rendered.split("<style>")[1].split("</style>")[0]
    assert rendered.count(report.plotly_js()[:2000]) == 1


def test_every_link_inside_the_page_has_a_target(rendered: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', _strip_script(rendered))
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in re.findall(r'href="(#[^"]+)"', rendered)} <= set(ids)


def test_cards_stand_worst_first_and_say_where_how_much_how_sure_and_against_what(rendered: str) -> None:
    cards = _without_scripts(rendered.split('id="headlines"')[1].split("</section>")[0])
    assert [n for n in re.findall(r"\b(valence|warmth|hedging)\b", cards)] == ["valence", "warmth", "hedging"]
    cards = " ".join(cards.split())
    assert "0.62 [0.53, 0.71]" in cards
    assert "attenuated by block 3; could begin as early as block 2" in cards
    assert "8 control concepts" in cards
    assert (
        "smallest attenuation this run could have shown: 0.41; about 310 scenarios would settle it" in cards
    )
    assert (
        "shown equivalent: the 90 % interval lies within ±0.2 at every block that shows the contrast" in cards
    )


def test_a_phantom_shows_what_was_planted_beside_what_was_found(rendered: str) -> None:
    box = " ".join(_without_scripts(rendered.split('id="planted"')[1].split("</section>")[0]).split())
    assert "attenuation of valence from block 3 on; measured keep 0.385" in box
    assert "✓ onset set holds the planted layer" in box and "✓ band holds the truth 0.61 at block 4" in box
    assert box.count("no change claimed") == 2


def test_a_pair_that_is_no_phantom_has_no_such_box(small: str) -> None:
    assert 'id="planted"' not in small


def test_a_missed_phantom_is_called_missed() -> None:
    study = make_phantom(make_small())
    truth = study.manifest["planted"] | {
        "layer": 6,
        "attenuation_by_layer": {str(block): 0.2 * (block > 5) for block in range(-1, 8)},
    }
    box = report.render_report(replace(study, manifest=study.manifest | {"planted": truth}))
    assert "✗ onset set misses the planted layer" in box and "✗ band misses the truth 0.00 at block 4" in box


def test_a_table_without_a_section_of_its_own_is_still_shown() -> None:
    study = make_small()
    extra = pd.DataFrame({"model": ["base"], "value": [1.5], "value_lower": [1.0], "value_upper": [2.0]})
    text = report.render_report(replace(study, tables=study.tables | {"text_metrics": extra}))
    assert 'id="text-metrics"' in text and "1.500 [1.000, 2.000]" in text


def test_an_unknown_flag_is_shown_raw() -> None:
    study = make_small()
    study.tables["attenuation"].loc[0, "flags"] = "brand_new_flag"
    text = report.render_report(study)
    assert 'id="flag-brand_new_flag"' in text


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = report.write_report(make_small(), tmp_path)
    assert written == tmp_path / "report.html" and [p.name for p in tmp_path.iterdir()] == ["report.html"]
    before = written.read_bytes()
    monkeypatch.setattr(report, "render_report", lambda study: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write_report(make_small(), tmp_path)
    assert written.read_bytes() == before


def test_nothing_measured_and_no_controls_still_make_a_report() -> None:
    study = make_study({"warmth": ("x", "inconclusive")}, templates=("raw",))
    frame = study.tables["attenuation"]
    frame = frame[frame["role"] == "target"].copy()
    kept = ["concept", "role", "template", "site", "layer", "depth", "measure", "n_scenarios", "flags"]
    frame.loc[:, [c for c in frame.columns if c not in kept]] = np.nan
    frame["flags"] = "base_not_detected;no_controls"
    headline = _headline("warmth", "inconclusive", "raw") | {"decision": "", "minimum_detectable": None, "flags": [
        "base_not_detected"], "scenarios_needed": None, "n_controls": 0, "quantity": "attenuation"}  # fmt: skip
    manifest = study.manifest | {"headlines": [headline]}
    text = report.render_report(
        replace(study, manifest=manifest, tables=study.tables | {"attenuation": frame})
    )
    shown = " ".join(_without_scripts(text).split())
    assert "nothing can be said. The base model does not show this contrast" in shown
    assert "no controls were measured" in shown and "nan" not in shown


@pytest.mark.parametrize("figure", [plots.attenuation_figure, plots.attenuation_plotly])
def test_an_unknown_concept_is_an_error_that_names_what_there_is(figure: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"'anger'.*expected one of.*valence"):
        figure(make_study().tables["attenuation"], None, "anger", template="raw", site="resid_post")


def test_print_and_screen_show_the_same_numbers() -> None:
    study = make_phantom()
    arguments = {"template": "shared", "site": "resid_post", "planted": study.manifest["planted"]}
    frames = (study.tables["attenuation"], study.tables["onset"], "valence")
    static, live = (
        plots.attenuation_figure(*frames, **arguments),
        plots.attenuation_plotly(*frames, **arguments),
    )
    drawn = {
        line.get_label(): list(line.get_ydata()) for axes in static.axes[:3] for line in axes.get_lines()
    }
    shown = {
        t.name: [np.nan if v is None else v for v in t.y] for t in live.data if t.mode == "lines+markers"
    }
    assert {"base", "aligned", "specific (band)", "planted truth"} <= set(shown)
    for name in shown:
        np.testing.assert_array_equal(shown[name], np.asarray(drawn[name], float))


def test_a_card_says_how_many_of_the_measured_controls_are_usable() -> None:
    headline = {
        "concept": "x",
        "template": "raw",
        "site": "resid_post",
        "flags": "few_controls",
        "n_controls": 1,
    }
    said = report.wording.card(headline, [], {}, 8)["against"]
    assert said == "8 control concepts, 1 of them usable; six are needed"


def test_with_few_controls_the_band_belongs_to_attenuation_and_specific_keeps_its_own_interval() -> None:
    study = make_small()
    frame = study.tables["attenuation"]
    frame.loc[frame["role"] == "target", "flags"] = "few_controls"
    frame.loc[frame["role"] == "target", "specific"] = -0.2
    frame.loc[frame["role"] == "target", ["specific_lower", "specific_upper"]] = [-0.9, 0.4]
    rows = frame[(frame["concept"] == "valence") & (frame["measure"] == "strength")]
    assert not plots.about_specific(rows).any()
    live = plots.attenuation_plotly(frame, None, "valence", template="raw", site="resid_post")
    bands = {t.name: t.y for t in live.data if t.fill == "toself"}
    assert bands["attenuation (band)"][0] == rows["band_upper"].iloc[0]
    assert set(bands["specific (pointwise)"]) == {-0.9, 0.4, None}
    heat = plots.overview_plotly(frame, template="raw", site="resid_post").data[1]
    assert list(heat.z[1]) == list(rows["attenuation"])


def test_where_only_a_bound_is_known_the_bound_is_shown_and_no_point() -> None:
    study = make_small()
    frame = study.tables["attenuation"]
    row = frame.index[
        (frame["concept"] == "valence") & (frame["layer"] == 7) & (frame["measure"] == "strength")
    ]
    frame.loc[row, ["specific", "attenuation"]] = np.nan
    frame.loc[row, ["band_lower", "band_upper", "flags"]] = [0.7, 1.0, "weak_signal;at_least"]
    heat = plots.overview_plotly(frame, template="raw", site="resid_post").data[1]
    assert heat.z[1][-1] == 0.7 and "at least 0.70" in heat.hovertext[1][-1]
    headline = study.manifest["headlines"][0] | {
        "size": None,
        "size_lower": 0.7,
        "size_upper": 1.0,
        "layer": 7,
    }
    text = report.render_report(replace(study, manifest=study.manifest | {"headlines": [headline]}))
    assert "at least 0.70" in _without_scripts(text)


def test_plot_takes_a_study_a_result_and_a_frame_and_refuses_the_rest() -> None:
    study = make_study()
    result = type("Result", (), {"to_frame": lambda self: study.tables["attenuation"]})()
    for thing in (study, result, study.tables["attenuation"]):
        assert isinstance(plots.plot(thing), matplotlib.figure.Figure)
    for wrong in (3, pd.DataFrame({"x": [1]}), study.tables["attenuation"].iloc[:0]):
        with pytest.raises(InputError, match="expected"):
            plots.plot(wrong)


def test_a_result_shows_itself_in_a_notebook() -> None:
    frame = make_study().tables["attenuation"]
    text = report.result_html(type("Result", (), {"key": "attenuation", "to_frame": lambda self: frame})())
    assert text.count("<img") == 1 and "valence" in text and "<script" not in text


@browser
def test_the_page_opens_from_a_file_draws_its_figures_and_asks_for_nothing(
    page: Page, rendered: str, tmp_path: Path
) -> None:
    (tmp_path / "report.html").write_text(rendered, encoding="utf8")
    page.open(tmp_path / "report.html", 1280, 900)
    assert page.run("getComputedStyle(document.querySelector('#overview .static')).display") == "none"
    assert page.complaints() == []
    assert page.requests() == [(tmp_path / "report.html").as_uri()]


@browser
def test_on_a_phone_nothing_is_wider_than_the_screen(page: Page, rendered: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(rendered, encoding="utf8")
    page.open(tmp_path / "report.html", 390, 844, mobile=True)
    assert page.run("document.documentElement.scrollWidth") == 390
    outside = """[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') &&
        e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 200))"""
    assert page.run(outside) == []


@browser
def test_headings_sort_and_the_filter_filters(page: Page, rendered: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(rendered, encoding="utf8")
    page.open(tmp_path / "report.html", 1280, 900)
    column = "[...document.querySelectorAll('#rows tbody tr')].map(r => r.cells[4].dataset.sort || '')"
    page.run("document.querySelectorAll('#rows th button')[4].click()")
    layers = page.run(column)
    known = [float(v) for v in layers if v]
    assert known == sorted(known) and layers[len(known) :] == [""] * (len(layers) - len(known)) != []
    page.run("""(() => { const box = document.querySelector('.filter input'); box.value = 'valence auroc';
        box.dispatchEvent(new Event('input')); })()""")
    visible = page.run(
        "[...document.querySelectorAll('#rows tbody tr')].filter(r => !r.hidden).map(r => r.innerText)"
    )
    assert visible and all("valence" in row and "auroc" in row for row in visible)


@browser
def test_a_filter_filters_the_table_under_it(page: Page, rendered: str, tmp_path: Path) -> None:
    """In a section that shows another table first."""
    grid = parts().grid(["x"], [[Cell("one", "one")]], "detail")
    box = '<label class="filter screen">'
    (tmp_path / "report.html").write_text(
        rendered.replace(box, f'<div id="detail">{grid}</div>{box}'), encoding="utf8"
    )
    page.open(tmp_path / "report.html", 1280, 900)
    page.run("""(() => { const box = document.querySelector('#rows .filter input'); box.value = 'no such word';
        box.dispatchEvent(new Event('input')); })()""")
    assert page.run("[...document.querySelectorAll('#detail tbody tr')].map(r => r.hidden)") == [False]
    assert page.run("[...document.querySelectorAll('#rows .tall tbody tr')].every(r => r.hidden)")


@browser
def test_a_hostile_name_runs_nothing_in_a_browser(page: Page, tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)><script>alert(1)</script>"
    path = report.write_report(make_study({name: ("x", "attenuated")}, templates=("raw",)), tmp_path)
    page.open(path, 1280, 900)
    assert page.complaints() == [] and page.requests() == [path.as_uri()]
    assert page.run("[...document.querySelectorAll('img')].every(i => i.src.startsWith('data:'))")
    assert name in page.run("document.querySelector('.card h3').innerText")


@browser
def test_print_shows_the_static_figures(page: Page, rendered: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(rendered, encoding="utf8")
    page.open(tmp_path / "report.html", 1280, 900)
    page.ask("Emulation.setEmulatedMedia", media="print")
    shown = [
        page.run(f"getComputedStyle(document.querySelector('#overview .{c}')).display")
        for c in ("static", "live")
    ]
    page.ask("Emulation.setEmulatedMedia", media="")
    assert shown == ["block", "none"]
