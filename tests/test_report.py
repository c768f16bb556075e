"""The report: one file that opens anywhere, says what was found, and never shows a number that is not there."""

import base64
import fcntl
import html
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest

from empathy_probes import plots, report
from empathy_probes.errors import InputError

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
    return common | {"size": 0.01, "size_lower": -0.05, "size_upper": 0.07, "sentence": f"{name} is preserved."}


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


def make_study(targets: dict[str, tuple[str, str]] | None = None, templates: tuple[str, ...] = ("raw", "shared")) -> Study:
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


def make_phantom() -> Study:
    """The same study, of a pair whose difference was planted."""
    study = make_study()
    truth = {
        "schema_version": 1, "family": "planted", "concept": "valence", "layer": 3, "keep_intended": 0.4,
        "keep_achieved": 0.385, "attenuation_by_layer": [0.0] * 4 + [0.615] * 5, "n_scenarios": 2000, "seed": 0,
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
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
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
        sent = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
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
