"""Texts with labels, scenarios and read positions: the stimuli file, as plain data.

One line of a stimuli file is one text of one scenario. A scenario is the unit of every split, fold and
resample; lines that share a `cluster` (scenarios written from one topic or frame family) share a unit.
The format is the contract of the architecture page: JSON Lines, or CSV and Parquet with the same columns. Public corpora
in formats of their own are read by `public_data`.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from empathy_probes.errors import InputError
from empathy_probes.public_data import read_public

FIELDS = ("id", "scenario", "text", "messages", "label", "concept", "frame", "cluster", "read", "readout")
REQUIRED = ("id", "scenario", "label")
ROLES = ("system", "user", "assistant")
# A concept names files and sections: one line of printable characters without path separators.
NAME = re.compile(r"[\w(][\w .,+()-]{0,79}")
LabelKind = Literal["binary", "graded", "categorical"]
ReadKind = Literal["last", "span", "message"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """system, user or assistant."""
    content: str


@dataclass(frozen=True)
class ReadoutSpec:
    """What one number per example is read from the model's answer (nats)."""

    kind: Literal["answers", "continuations"]
    """Two sets of next tokens, or two continuations."""
    expressive: tuple[str, ...]
    """Answers (or the one continuation) that express the concept."""
    attenuated: tuple[str, ...]
    """Answers (or the one continuation) that do not."""


@dataclass(frozen=True)
class Stimulus:
    """One text of one scenario."""

    id: str
    scenario: str
    messages: tuple[Message, ...]
    """The turns of a chat item; empty where the item is a plain `text`."""
    text: str
    """The plain text; for chat items the contents joined by newlines."""
    label: float | str
    frame: str = ""
    cluster: str = ""
    read: str | int | None = None
    """None: last token. A string: mean over that span. An integer: last token of that message."""
    readout: ReadoutSpec | None = None

    @property
    def unit(self) -> str:
        """The unit of resampling: the cluster where one is given, else the scenario."""
        return self.cluster or self.scenario


@dataclass(frozen=True)
class StimulusSet:
    """All texts of one concept."""

    concept: str
    items: tuple[Stimulus, ...]
    kind: LabelKind
    read_kind: ReadKind

    @property
    def units(self) -> tuple[str, ...]:
        """Units of resampling in order of first appearance."""
        return tuple(dict.fromkeys(item.unit for item in self.items))

    @property
    def n_scenarios(self) -> int:
        """The number of units that every interval counts."""
        return len(self.units)

    def of_units(self, units: Collection[str]) -> StimulusSet:
        """The texts of some units."""
        return replace(self, items=tuple(item for item in self.items if item.unit in units))

    def to_rows(self) -> list[dict[str, Any]]:
        """The lines of a stimuli file that `load_stimuli` reads as these texts."""
        return [_row(item) for item in self.items]

    @property
    def digest(self) -> str:
        """SHA-256 of everything that can change a number: texts, labels, scenarios, read positions."""
        plain = [self.concept, self.kind, self.read_kind, [asdict(item) for item in self.items]]
        return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def load_stimuli(
    path: str | Path, format: str | None = None, *, scenarios: int = 200, seed: int = 0, read: str = "mean"
) -> tuple[StimulusSet, ...]:
    """Read a stimuli file, or a public corpus: one `StimulusSet` per concept in it.

    Args:
        path: `.jsonl`, `.csv` or `.parquet`. A file's concept is its stem unless its lines say `concept`.
        format: of a public corpus, one of `public_data.FORMATS`; None for a stimuli file.
        scenarios: wanted per concept of a corpus, whose single texts are paired by length.
        seed: which texts of a corpus are drawn.
        read: where texts of a corpus are read, `mean` over the text or `last`; a stimuli file says so itself.

    Raises:
        InputError: the file is missing, empty, not UTF-8, or a line breaks the format; the message names
            file, line, field and remedy.
    """
    if format is not None:
        found = read_public(path, format, scenarios=scenarios, seed=seed, read=read)
        return tuple(stimuli_from_rows(rows, concept) for concept, rows in found.items())
    path = Path(path)
    rows = _read_rows(path)
    if not rows:
        raise InputError(
            f"{path} holds no stimuli: got an empty file, expected one JSON object per line; add at least two labelled texts per scenario"
        )
    grouped: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for number, row in rows:
        concept = row.get("concept", path.stem)
        if not isinstance(concept, str) or not NAME.fullmatch(concept):
            expected = "a name of up to 80 letters, digits, spaces and . , + - ( )"
            raise _bad(path, number, "concept", concept, expected, "name the concept, or rename the file, so")
        grouped.setdefault(concept, []).append((number, row))
    return tuple(_stimulus_set(concept, numbered, path) for concept, numbered in grouped.items())


def stimuli_from_rows(rows: Sequence[Mapping[str, Any]], concept: str) -> StimulusSet:
    """The same as `load_stimuli` for rows that are already in memory, all of one concept.

    >>> rows = [{"id": f"{s}{y}", "scenario": s, "text": f"{s} {y}", "label": y} for s in "ab" for y in (0, 1)]
    >>> stimuli_from_rows(rows, "demo").n_scenarios
    2
    """
    return _stimulus_set(concept, list(enumerate(rows, start=1)), Path(f"<{concept}>"))


def _row(item: Stimulus) -> dict[str, Any]:
    label = item.label
    row: dict[str, Any] = {"id": item.id, "scenario": item.scenario}
    row |= {"messages": [asdict(turn) for turn in item.messages]} if item.messages else {"text": item.text}
    row["label"] = int(label) if isinstance(label, float) and label.is_integer() else label
    row |= {name: getattr(item, name) for name in ("frame", "cluster") if getattr(item, name)}
    if item.read is not None:
        row["read"] = {"span" if isinstance(item.read, str) else "message": item.read}
    if item.readout is not None:
        sides = [list(item.readout.expressive), list(item.readout.attenuated)]
        plain = [side[0] for side in sides]
        row["readout"] = {item.readout.kind: sides if item.readout.kind == "answers" else plain}
    return row


def _bad(path: Path, number: int, field: str, got: object, expected: str, remedy: str) -> InputError:
    shown = repr(got)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return InputError(f"{path}, line {number}, field '{field}': got {shown}, expected {expected}; {remedy}")


def _read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        there = path.is_file()
        if there:
            path.open("rb").close()
    except OSError as error:
        raise InputError(
            f"{path} cannot be opened ({error.strerror}), expected a readable file; check the path"
        ) from None
    if not there:
        raise InputError(
            f"no stimuli file at {path}: expected a .jsonl, .csv or .parquet file; check the path"
        )
    if path.suffix == ".jsonl":
        return _read_json_lines(path)
    if path.suffix in {".csv", ".parquet"}:
        return _read_table(path)
    raise InputError(
        f"{path} has suffix '{path.suffix}': expected .jsonl, .csv or .parquet; rename or convert the file"
    )


def _read_json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8: byte {error.start} cannot be decoded, expected UTF-8 text; save the file as UTF-8"
        ) from None
    rows = []
    # Split on \n only: str.splitlines would also cut at U+2028 inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = (
                f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            )
            raise InputError(
                f"{path}, line {number} is not JSON ({reason}): expected one object per line; fix or remove the line"
            ) from None
        if not isinstance(row, dict):
            raise InputError(
                f"{path}, line {number} is a JSON {type(row).__name__}: expected an object with the fields id, "
                "scenario, text and label; fix or remove the line"
            )
        rows.append(
            (number, {field: value for field, value in row.items() if value is not None or field in REQUIRED})
        )
    return rows


def _read_table(path: Path) -> list[tuple[int, dict[str, Any]]]:
    if path.suffix == ".parquet":
        return [(i + 1, row) for i, row in enumerate(_parquet_rows(path))]
    rows = []
    # Read as text, so that an id 007 or a text "NA" stays what it is; only the label is a number where it can be.
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for record in reader:
                if None in record or None in record.values():
                    raise csv.Error(f"line {reader.line_num} has not as many cells as the header")
                rows.append(
                    (
                        reader.line_num,
                        _csv_row({k: v for k, v in record.items() if v != ""}, path, reader.line_num),
                    )
                )
        except csv.Error as error:
            raise InputError(
                f"{path} is not CSV ({error}): expected a header and as many cells per line; repair it"
            ) from None
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} is not UTF-8 ({error.reason}): expected UTF-8 text; save the file as UTF-8"
            ) from None
    return rows


def _csv_row(row: dict[str, Any], path: Path, number: int) -> dict[str, Any]:
    if "label" in row:
        with contextlib.suppress(ValueError):
            row["label"] = float(row["label"])
    for field in {"messages", "read", "readout"} & row.keys():
        if row[field][:1] in "[{":
            try:
                row[field] = json.loads(row[field])
            except (ValueError, RecursionError):
                raise _bad(path, number, field, row[field], "JSON", "fix the cell") from None
    return row


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(
            f"{path} is Parquet and pyarrow is not installed, expected it; pip install 'empathy-probes[parquet]'"
        ) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise InputError(
            f"{path} cannot be read as Parquet ({error}): expected a table; write it again"
        ) from None

    def plain(value: Any) -> Any:
        if isinstance(value, dict):  # a struct column fills the members that other rows have with None
            return {key: plain(entry) for key, entry in value.items() if entry is not None}
        if isinstance(value, str) and value[:1] in "[{":
            with contextlib.suppress(ValueError):
                return json.loads(value)
        return value

    nested = {"messages", "read", "readout"}
    return [
        {key: plain(value) if key in nested else value for key, value in row.items() if value is not None}
        for row in rows
    ]


def _stimulus_set(concept: str, rows: list[tuple[int, Mapping[str, Any]]], path: Path) -> StimulusSet:
    items: list[Stimulus] = []
    read_kinds: set[ReadKind] = set()
    seen: dict[str, int] = {}
    for number, row in rows:
        item, read_kind = _stimulus(row, number, path)
        if item.id in seen:
            raise _bad(
                path,
                number,
                "id",
                item.id,
                f"an id that line {seen[item.id]} does not have",
                "make ids unique",
            )
        seen[item.id] = number
        read_kinds.add(read_kind)
        items.append(item)
    if len(read_kinds) > 1:
        raise InputError(
            f"{path}, concept '{concept}': field 'read' got the kinds {', '.join(sorted(read_kinds))}, expected one "
            "kind per file; split the file or read every line at the same kind of position"
        )
    kind = _label_kind(items, concept, path)
    _check_scenarios(items, kind, concept, path)
    return StimulusSet(concept, tuple(items), kind, read_kinds.pop())


def _stimulus(row: Mapping[str, Any], number: int, path: Path) -> tuple[Stimulus, ReadKind]:
    for field in row:
        if field not in FIELDS:
            raise _bad(
                path, number, field, row[field], f"only the fields {', '.join(FIELDS)}", "remove the field"
            )
    for field in REQUIRED:
        if field not in row:
            raise _bad(path, number, field, "nothing", "a value", "add the field")
    if not _is_unicode(row):
        raise _bad(
            path, number, "text", "half of a surrogate pair", "whole Unicode characters", "repair the escape"
        )
    names = {}
    for field in ("id", "scenario", "frame", "cluster"):
        value = row.get(field, "")
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or (field in {"id", "scenario"} and not value):
            raise _bad(path, number, field, row[field], "a non-empty string", "name it")
        names[field] = value
    label = row["label"]
    if isinstance(label, bool) or not isinstance(label, int | float | str) or label == "":
        raise _bad(path, number, "label", label, "a number or a non-empty string", "label the text")
    if not isinstance(label, str):
        try:
            label = float(label)
        except OverflowError:
            label = math.inf
        if not math.isfinite(label):
            raise _bad(path, number, "label", label, "a finite number", "label the text")
    messages, text = _content(row, number, path)
    read, read_kind = _read_position(row.get("read", "last"), messages, text, number, path)
    readout = _readout(row["readout"], number, path) if "readout" in row else None
    item = Stimulus(
        id=names["id"], scenario=names["scenario"], messages=messages, text=text, label=label,
        frame=names["frame"], cluster=names["cluster"], read=read, readout=readout,
    )  # fmt: skip
    return item, read_kind


def _is_unicode(row: Mapping[str, Any]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def _content(row: Mapping[str, Any], number: int, path: Path) -> tuple[tuple[Message, ...], str]:
    if ("text" in row) == ("messages" in row):
        got = "both" if "text" in row else "neither"
        raise _bad(path, number, "text", got, "exactly one of 'text' and 'messages'", "keep one of them")
    if "text" in row:
        text = row["text"]
        if not isinstance(text, str) or not text.strip():
            raise _bad(path, number, "text", text, "a non-empty string", "write the text or remove the line")
        return (), text
    turns = row["messages"]
    expected = 'a list of {"role": "user", "content": "..."} objects'
    if not isinstance(turns, list) or not turns:
        raise _bad(path, number, "messages", turns, expected, "write the turns")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or set(turn) != {"role", "content"} or turn["role"] not in ROLES:
            raise _bad(
                path,
                number,
                "messages",
                turn,
                f"{expected} with a role among {', '.join(ROLES)}",
                "fix the turn",
            )
        if not isinstance(turn["content"], str) or not turn["content"].strip():
            raise _bad(path, number, "messages", turn, "a non-empty content", "write the turn or remove it")
        messages.append(Message(turn["role"], turn["content"]))
    return tuple(messages), "\n".join(message.content for message in messages)


def _read_position(
    spec: Any, messages: tuple[Message, ...], text: str, number: int, path: Path
) -> tuple[str | int | None, ReadKind]:
    if spec == "last":
        return None, "last"
    if isinstance(spec, dict) and set(spec) == {"span"} and isinstance(spec["span"], str) and spec["span"]:
        count = text.count(spec["span"])
        if count != 1:
            raise _bad(path, number, "read", spec["span"], f"a substring that occurs once in the text (it occurs {count} times)", "choose a longer or another substring")  # fmt: skip
        return spec["span"], "span"
    if isinstance(spec, dict) and set(spec) == {"message"} and type(spec["message"]) is int:
        if not 0 <= spec["message"] < len(messages):
            raise _bad(
                path,
                number,
                "read",
                spec,
                f"a message index from 0 to {len(messages) - 1}",
                "name a message of this line",
            )
        return spec["message"], "message"
    raise _bad(
        path, number, "read", spec, '"last", {"span": "substring"} or {"message": i}', "use one of these"
    )


def read_readouts(path: str | Path) -> ReadoutSpec | dict[str, ReadoutSpec]:
    """Read a readout file: one readout for all concepts, or one per concept by name.

    Raises:
        InputError: the file is missing, no JSON, or not of this form.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}), expected a JSON file with a readout; check the path"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}), expected a readout; repair it") from None
    if not isinstance(content, dict) or not content or {"answers", "continuations"} & content.keys():
        return _readout(content, 1, path)
    return {str(concept): _readout(spec, 1, path) for concept, spec in content.items()}


def _readout(spec: Any, number: int, path: Path) -> ReadoutSpec:
    expected = (
        '{"answers": [[" great", ...], [" awful", ...]]} or {"continuations": ["expressive", "attenuated"]}'
    )
    remedy = "write the readout in one of these forms"

    def words(value: Any) -> bool:
        return (
            isinstance(value, list) and bool(value) and all(isinstance(word, str) and word for word in value)
        )

    if not isinstance(spec, dict) or len(spec) != 1 or set(spec) - {"answers", "continuations"}:
        raise _bad(path, number, "readout", spec, expected, remedy)
    kind, sides = next(iter(spec.items()))
    if not isinstance(sides, list) or len(sides) != 2:
        raise _bad(path, number, "readout", spec, expected, remedy)
    if kind == "answers" and all(words(side) for side in sides):
        if set(sides[0]) & set(sides[1]):
            raise _bad(
                path, number, "readout", spec, "two sets without a common answer", "drop the common answers"
            )
        return ReadoutSpec("answers", tuple(sides[0]), tuple(sides[1]))
    if kind == "continuations" and words(sides):
        return ReadoutSpec("continuations", (sides[0],), (sides[1],))
    raise _bad(path, number, "readout", spec, expected, remedy)


def _label_kind(items: list[Stimulus], concept: str, path: Path) -> LabelKind:
    strings = {isinstance(item.label, str) for item in items}
    labels = {item.label for item in items}
    if len(strings) > 1:
        raise InputError(
            f"{path}, concept '{concept}': field 'label' mixes strings and numbers, expected one of the two; "
            "use numbers for binary or graded labels and strings for categories"
        )
    if len(labels) < 2:
        raise InputError(
            f"{path}, concept '{concept}': every label is {labels.pop()!r}, expected at least two different labels; "
            "add texts of the other label"
        )
    if strings == {True}:
        return "categorical"
    if len(labels) == 2 and labels != {0.0, 1.0}:
        raise InputError(
            f"{path}, concept '{concept}': the labels are {' and '.join(f'{label:g}' for label in sorted(labels, key=float))}, expected "
            "0 and 1 where there are two; write 1 for the texts that express the concept and 0 for the others"
        )
    return "binary" if len(labels) == 2 else "graded"


def _check_scenarios(items: list[Stimulus], kind: LabelKind, concept: str, path: Path) -> None:
    labels: dict[str, list[float | str]] = {}
    clusters: dict[str, set[str]] = {}
    for item in items:
        labels.setdefault(item.scenario, []).append(item.label)
        clusters.setdefault(item.scenario, set()).add(item.cluster)
    named = {cluster for found in clusters.values() for cluster in found if cluster}
    for scenario, found in labels.items():
        if scenario in named and clusters[scenario] == {""}:
            raise InputError(
                f"{path}, concept '{concept}', scenario '{scenario}': it has no cluster and a cluster of other scenarios has its "
                "name, expected different names, as both are units of resampling; rename one"
            )
        if len(set(found)) < 2:
            expected = (
                "at least one text of each label" if kind == "binary" else "texts of at least two labels"
            )
            raise InputError(
                f"{path}, concept '{concept}', scenario '{scenario}': got {len(found)} text(s), all with label "
                f"{found[0]!r}, expected {expected}; add the missing text or remove the scenario"
            )
        if len(clusters[scenario]) > 1:
            raise InputError(
                f"{path}, concept '{concept}', scenario '{scenario}': got the clusters "
                f"{', '.join(sorted(clusters[scenario]))}, expected one cluster per scenario; give all its lines the same"
            )
