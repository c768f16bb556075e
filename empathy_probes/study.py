"""A study: results of one pair of models, and the folder they are kept in.

The tables are made from the results and rounded as the files are, so that a report made now and one made from the
folder later have the same bytes. A folder appears complete or not at all: an interrupted study leaves its work
in the activation store, and the same command goes on from there.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from empathy_probes import __version__
from empathy_probes.attenuation import Finding, study_options
from empathy_probes.design import Design, Settings, describe_design
from empathy_probes.errors import InputError, ProvenanceError, StoreError
from empathy_probes.ledger import headline_dicts, headlines, ledger_frame
from empathy_probes.stages import RESULTS, TYPES, answer_questions, finding_of, plan_questions
from empathy_probes.store import (
    SCHEMA_VERSION,
    check_schema,
    digest_of,
    load_record,
    open_store,
    save_record,
    write_file,
)
from empathy_probes.summaries import summary_frame

LIBRARIES = ("torch", "transformer-lens", "transformers", "numpy", "scipy", "scikit-learn")
INTEGER_COLUMNS = {
    "layer", "head", "onset_lower", "onset_upper", "peak_layer", "peak_lower", "peak_upper", "n_scenarios", "scenarios_needed"
}  # fmt: skip
TEXT_COLUMNS = {
    "flags",
    "group",
    "decision",
    "mechanism",
    "dimension",
    "verdict",
    "missing",
    "boundary",
    "position",
}


_RECORD = {"name": str, "digest": str, "manifest": dict, "results": dict}


@dataclass(frozen=True)
class Study:
    """Results of one pair of models under one name."""

    name: str
    results: Sequence[Any]
    """One of each kind; attenuation among them, and all of the same models and texts."""
    planted: Mapping[str, Any] | None = None
    """`truth.json` of a phantom, shown beside what was found."""
    notes: Sequence[str] = ()
    """What was left out and why, in words for the report."""
    saved_manifest: Mapping[str, Any] | None = None
    """The manifest of the folder this study was loaded from: versions then, not now."""

    def __post_init__(self) -> None:
        for result in self.results:
            if not isinstance(result, RESULTS):
                raise InputError(
                    f"a study got a {type(result).__name__}, expected results of the kinds {', '.join(cls.__name__ for cls in RESULTS)}; "
                    "save it by itself"
                )
        keys = [result.key for result in self.results]
        if not keys or len(set(keys)) != len(keys):
            raise InputError(
                f"a study got the results [{', '.join(keys)}], expected at least one, and one of each kind; drop the others"
            )
        finding_of(self.results)
        _check_models(self.results)
        _check_texts(self.results)

    @property
    def finding(self) -> Finding:
        """The attenuation that everything else is compared with."""
        return finding_of(self.results)

    def result(self, key: str) -> Any:
        """The result of a kind, or None."""
        return next((result for result in self.results if result.key == key), None)

    @cached_property
    def tables(self) -> Mapping[str, pd.DataFrame]:
        """The contract's tables by file stem, with the numbers as the files hold them."""
        frames = {
            **{result.key: result.to_frame() for result in self.results},
            "onset": self.finding.onset_frame(),
            "summary": summary_frame(self.finding),
            "ledger": ledger_frame(
                self.finding, *(self.result(key) for key in ("coupling", "stitching", "gain"))
            ),
        }
        return {stem: _as_saved(frame) for stem, frame in frames.items()}

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        """Versions, models, concepts, options, headlines: plain data."""
        if self.saved_manifest is not None:
            return self.saved_manifest
        return {
            "package": {"name": "empathy-probes", "version": __version__},
            "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
            **{key: value for key, value in self.finding.provenance.items() if key != "design"},
            "options": self.finding.options,
            "planted": dict(self.planted) if self.planted else None,
            "notes": [*_notes(self.finding), *self.notes],
            "headlines": headline_dicts(headlines(self.finding)),
        }

    @property
    def digest(self) -> str:
        """Equal for equal options, inputs and weights, wherever the files lie."""
        keys = [result.key for result in self.results]
        return _digest(self.finding.provenance, self.finding.options, self.planted, keys)

    def save(self, out: str | Path) -> Path:
        """Write the output folder of the contract, whole or not at all; the report is `write_report`'s.

        Raises:
            InputError: the folder holds something else, or cannot be written.
        """
        out = Path(out)
        if not _holds(out, self.digest):
            _write_folder(self, out)
        return out


def run_study(
    design: Design,
    settings: Settings,
    out: str | Path,
    *,
    name: str | None = None,
    stages: Sequence[str] = ("encode",),
    store: str | None = None,
    planted: Mapping[str, Any] | None = None,
) -> Study:
    """Run a design and save it as a folder, or load the folder where this very study is already there.

    Args:
        design: from `resolve` or `design_study`.
        settings: margin, draws, seed.
        out: the output folder; created whole at the end.
        name: the report's title.
        stages: of encode, use and express; encode is always run.
        store: activation store URL.
        planted: `truth.json` of a phantom, shown beside what was found.

    Raises:
        InputError: the folder holds something else, or a stage cannot be run; nothing has run then.
    """
    out, described = Path(out), describe_design(design)
    questions, notes = plan_questions(design, stages)
    keys = [question.key for question in questions]
    if not _holds(out, _digest(described, study_options(described, settings), planted, keys)):
        results = answer_questions(questions, design, settings, open_store(store))
        title = name or f"{_short(design.pair.aligned.name)} against {_short(design.pair.base.name)}"
        Study(title, results, planted, notes).save(out)
    return load_study(out)


def _check_models(results: Sequence[Any]) -> None:
    # What was asked of one model alone names only that one, and not always as which of the two.
    pair = finding_of(results).provenance
    known = {side: pair[side]["weights"] for side in ("base", "aligned") if side in pair}
    for result in results:
        asked = {side: result.provenance[side]["weights"] for side in known if side in result.provenance}
        alone = result.provenance.get("model")
        if any(known[side] != found for side, found in asked.items()) or (
            alone and alone["weights"] not in known.values()
        ):
            raise ProvenanceError(
                "a study got results of different pairs of models, expected one pair; make one study per pair"
            )


def _check_texts(results: Sequence[Any]) -> None:
    seen: dict[str, tuple[str, str]] = {}
    for result in results:
        for name, concept in result.provenance.get("concepts", {}).items():
            # Controls are joined with nothing of another result, and steering leaves out what they ask.
            if concept.get("role") == "control":
                continue
            first, digest = seen.setdefault(name, (result.key, concept["digest"]))
            if digest != concept["digest"]:
                raise ProvenanceError(
                    f"concept '{name}' has other texts in {result.key} (digest {concept['digest'][:12]}) than in {first} "
                    f"({digest[:12]}), expected the same stimuli in all results of a study; measure both on the same concept"
                )


def _short(name: str) -> str:
    return Path(name.rstrip("/")).name


def _digest(
    provenance: Mapping[str, Any],
    options: Mapping[str, Any],
    planted: Mapping[str, Any] | None,
    keys: Sequence[str],
) -> str:
    described = dict(provenance)
    for side in ("base", "aligned"):
        described[side] = {k: v for k, v in provenance[side].items() if k not in ("name", "revision")}
    # Prose about a concept changes no number.
    described["concepts"] = {
        name: {k: v for k, v in concept.items() if k not in ("description", "labels")}
        for name, concept in provenance["concepts"].items()
    }
    return digest_of({**described, "options": options, "planted": planted, "results": sorted(keys)})


def _holds(out: Path, digest: str) -> bool:
    """Whether the folder holds this study; anything else in it, and a place that cannot be written, is refused."""
    if out.resolve() == Path.cwd():
        raise InputError(
            f"the output {out} is the working folder, expected a folder of its own; choose another --out"
        )
    if not out.exists():
        parent = next(folder for folder in out.resolve().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise InputError(
                f"the output {out} cannot be made in {parent}, expected a writable folder; choose another --out"
            )
        return False
    if not out.is_dir():
        raise InputError(
            f"the output {out} is a file, expected a folder or nothing there; choose another --out"
        )
    if not (out / "study.json").is_file():
        if any(out.iterdir()):
            raise InputError(
                f"the output folder {out} holds other files and no study, expected an empty or a new folder; choose "
                "another --out"
            )
        return False
    found = _read_record(out)["digest"]
    if found != digest:
        raise InputError(
            f"the output folder {out} holds another study (digest {found[:12]}, this one has {digest[:12]}), expected "
            "the same study or a new folder; choose another --out or remove it"
        )
    return True


def _notes(finding: Finding) -> list[str]:
    notes = []
    if "no_chat_template" in finding.flags:
        notes.append("The aligned tokenizer has no chat template, so only raw text was measured.")
    if "own" in finding.templates:
        notes.append("Each model read its own template: differences mix the model with its template.")
    if finding.provenance["base"]["weights"] == finding.provenance["aligned"]["weights"]:
        notes.append("The two models have identical weights: this is what nothing looks like.")
    return notes


def _write_folder(study: Study, out: Path) -> None:
    """Write everything beside its final place, then rename."""
    out = out.resolve()  # "." has no name to put a dot before
    partial = out.parent / f".{out.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for stem, frame in study.tables.items():
            write_file(partial / f"{stem}.csv", _table_bytes(frame))
        save_record(tuple(study.results), partial / "arrays.safetensors")
        _save_vectors(study.finding, partial / "vectors")
        index = {
            path.relative_to(partial).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        record = {
            "schema_version": SCHEMA_VERSION, "name": study.name, "digest": study.digest,
            "manifest": _jsonable(study.manifest), "results": index,
        }  # fmt: skip
        text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
        write_file(partial / "study.json", text.encode())
        if out.exists():  # empty, as `_holds` made sure
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise InputError(
            f"{out} cannot be written ({error.strerror or error}), expected a writable folder; choose another --out"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# What of a category's name does not belong into the name of a file.
UNSAFE = re.compile(r"[^\w]+")


def _save_vectors(finding: Finding, folder: Path) -> None:
    """One file per concept (or category of it), model, template and site: its direction at every block."""
    for m in finding.measurements:
        for model in ("base", "aligned"):
            for category in m.categories or (None,):
                vector = finding.vector(model, m.concept, template=m.template, site=m.site, category=category)
                name = m.concept if category is None else f"{m.concept}-{UNSAFE.sub('-', category)}"
                path = folder / f"{name}.{model}.{m.template}.{m.site}.safetensors"
                # "good/joy" and "good joy", or a concept that is called like another's category.
                if path.exists():
                    unlike = digest_of([m.concept, category])[:8]
                    path = path.with_name(f"{name}-{unlike}{path.name[len(name) :]}")
                vector.save(path)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_jsonable(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_study(folder: str | Path) -> Study:
    """Load a saved study.

    Raises:
        StoreError: the folder holds none, a file of it is missing or changed, or it is of a newer version.
    """
    folder = Path(folder)
    record = _read_record(folder)
    for name, expected in record["results"].items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise StoreError(
                f"{path} is missing or was changed after the study was saved, expected the file that study.json lists; "
                "run the study again into a new folder"
            )
    manifest = record["manifest"]
    results = load_record(folder / "arrays.safetensors", TYPES)
    return Study(record["name"], results, manifest["planted"], saved_manifest=manifest)


def _table_bytes(frame: pd.DataFrame) -> bytes:
    return frame.to_csv(index=False, float_format="%.10g").encode()


def _as_saved(frame: pd.DataFrame) -> pd.DataFrame:
    """With the numbers as a file holds them, and what the figures know beside them."""
    saved = _read_table(_table_bytes(frame))
    saved.attrs = frame.attrs
    return saved


def _read_table(data: bytes) -> pd.DataFrame:
    frame = pd.read_csv(io.BytesIO(data), keep_default_na=False, na_values=[""])
    for column in frame.columns:
        if column in INTEGER_COLUMNS:
            frame[column] = frame[column].astype("Int64")
        elif column in TEXT_COLUMNS:
            frame[column] = frame[column].fillna("").astype(str)
    return frame


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / "study.json"
    try:
        record = json.loads(path.read_text(encoding="utf8"))
        check_schema(record["schema_version"], path)
        if not all(isinstance(record[key], kind) for key, kind in _RECORD.items()):
            raise TypeError
    except FileNotFoundError:
        raise StoreError(
            f"no study in {folder}: got no study.json there, expected a folder that compare or run wrote; check the path"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} is damaged ({type(error).__name__}), expected the record of a study; run the study again"
        ) from None
    return record
