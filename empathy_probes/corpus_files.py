"""Files of public corpora: text, comma-separated and JSON; an error names file and line and never shows a text."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from empathy_probes.errors import InputError


def corpus_files(path: str, pattern: str) -> list[Path]:
    """The file itself, or those of a folder that have the published names."""
    place = Path(path)
    found = sorted(place.glob(pattern)) if place.is_dir() else [place]
    if not found:
        raise InputError(
            f"{place} holds no file {pattern}, expected the corpus as it is published; check the path"
        )
    return found


def read_csv(path: Path, columns: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """Rows of a comma-separated file with their line numbers; at least one row. Names of columns in small letters."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    rows = []
    try:
        header = [name.strip().lower().replace(" ", "_") for name in next(reader, [])]
        absent = [column for column in columns if column not in header]
        if absent:
            raise bad_data(path, 1, f"no column {', '.join(absent)}", f"the columns {', '.join(columns)}")
        for cells in reader:
            if cells and len(cells) != len(header):
                raise bad_data(path, reader.line_num, "another number of fields", "one field per column")
            if cells:
                rows.append((reader.line_num, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise bad_data(path, reader.line_num, str(error), "comma-separated values") from None
    if not rows:
        raise bad_data(path, 2, "no rows", "at least one row")
    return rows


def parse_number(path: Path, line: int, text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise bad_data(path, line, f"{what} {text!r}", "a finite number")
    return value


def read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise bad_data(path, error.lineno, error.msg, "JSON") from None


def read_text(path: Path) -> str:
    """A file's text; line endings are kept as they are."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(
            f"cannot read {path} ({error.strerror}): expected a file of the public data; check the path"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8: got an invalid byte at {error.start}, expected UTF-8; fetch the file again"
        ) from None


def bad_data(path: Path, line: int, got: str, expected: str) -> InputError:
    """The error for a malformed file; never shows a text of the data."""
    return InputError(f"{path}, line {line}: got {got}, expected {expected}; fetch the file again")
