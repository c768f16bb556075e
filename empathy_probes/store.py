"""Arrays and frozen dataclasses on disk: safetensors and JSON only, atomic, at any fsspec URL.

The activation store is content-addressed: an entry's name is the digest of everything that decides its
numbers, so an entry is either right or absent. A long computation leaves numbered parts beside the entry
it will become; a restarted one reads them and goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import posixpath
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import platformdirs
from safetensors import SafetensorError
from safetensors.numpy import load, save

from empathy_probes.errors import InputError, StoreError

SCHEMA_VERSION = 1
HEADER = "empathy_probes"
logger = logging.getLogger(__name__)


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON-able value in canonical form.

    >>> digest_of({"b": 1, "a": 2}) == digest_of({"a": 2, "b": 1})
    True
    """
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def default_store_url() -> str:
    """`./activations` inside a checkout, else `$EMPATHY_PROBES_STORE`, else the user's cache folder."""
    here = Path.cwd()
    if (here / "activations" / "README.md").is_file() and (here / "empathy_probes" / "store.py").is_file():
        return str(here / "activations")
    return os.environ.get("EMPATHY_PROBES_STORE") or platformdirs.user_cache_dir("empathy_probes")


@dataclass(frozen=True)
class StoreInfo:
    """What a store holds."""

    url: str
    entries: int
    parts: int
    """Shards of computations that have not finished."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Store:
    """A folder of content-addressed entries."""

    url: str
    """A local path or any fsspec URL."""

    def _place(self, *parts: str) -> tuple[fsspec.AbstractFileSystem, str]:
        try:
            fs, root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise InputError(
                f"the store '{self.url}' cannot be opened ({error}): expected a folder or an fsspec URL whose "
                "backend is installed; choose another --store"
            ) from None
        return fs, posixpath.join(root, *parts)

    def read(self, key: str) -> dict[str, np.ndarray] | None:
        """The arrays of an entry, or None where there is none. A damaged entry counts as absent."""
        return self._read_file(f"{key}.safetensors")

    def write(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write an entry whole or not at all, and drop the parts it was made from."""
        self._write_file(f"{key}.safetensors", arrays)
        self.drop_parts(key)

    def remember(self, key: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The one array of an entry; computed and written where there is none."""
        return self.remember_all(key, lambda: {"values": compute()})["values"]

    def remember_all(self, key: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The same of several arrays by name."""
        found = self.read(key)
        if found is None:
            found = compute()
            self.write(key, found)
        return found

    def remember_record(self, key: str, compute: Callable[[], Any], types: Mapping[str, type]) -> Any:
        """A frozen dataclass under a key, as `remember` keeps an array; `types` as in `load_record`."""
        fs, path = self._place(f"{key}.safetensors")
        try:
            with fs.open(path, "rb") as file:
                return record_from_bytes(file.read(), types, path)
        except (FileNotFoundError, StoreError):
            record = compute()
            write_atomically(fs, path, record_to_bytes(record))
            return record

    def drop_parts(self, key: str) -> None:
        """Remove the shards of a computation that has finished."""
        fs, folder = self._place(f"{key}.parts")
        if fs.exists(folder):
            fs.rm(folder, recursive=True)

    def read_parts(self, key: str) -> list[dict[str, np.ndarray]]:
        """Shards that an interrupted computation of this entry left, in the order they were made."""
        fs, folder = self._place(f"{key}.parts")
        if not fs.exists(folder):
            return []
        names = sorted(posixpath.basename(path) for path in fs.ls(folder, detail=False))
        found = (self._read_file(f"{key}.parts/{name}") for name in names if name.endswith(".safetensors"))
        return [part for part in found if part is not None]

    def next_part(self, key: str) -> int:
        """A number that no part of this entry has, damaged ones included."""
        fs, folder = self._place(f"{key}.parts")
        names = (
            [posixpath.basename(path) for path in fs.ls(folder, detail=False)] if fs.exists(folder) else []
        )
        return 1 + max((int(name[:6]) for name in names if name[:6].isdigit()), default=-1)

    def write_part(self, key: str, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write one shard of an unfinished entry."""
        self._write_file(f"{key}.parts/{number:06d}.safetensors", arrays)

    def info(self) -> StoreInfo:
        """Count entries, unfinished parts and bytes."""
        sizes = self._sizes()
        parts = sum(".parts/" in path for path in sizes)
        return StoreInfo(self.url, len(sizes) - parts, parts, sum(sizes.values()))

    def clear(self) -> StoreInfo:
        """Remove every entry and part, and nothing else; says what was there."""
        before = self.info()
        fs, _ = self._place()
        ours = self._sizes()
        for path in ours:
            fs.rm(path)
        for folder in {posixpath.dirname(path) for path in ours if ".parts/" in path}:
            if fs.exists(folder) and not fs.ls(folder):
                fs.rmdir(folder)
        return before

    def _sizes(self) -> dict[str, int]:
        fs, root = self._place()
        if not fs.exists(root):
            return {}
        if fs.isfile(root):
            raise InputError(
                f"the store '{self.url}' is a file, expected a folder or nothing there; choose another --store"
            )
        # Only names that this module gives: a folder named by mistake may hold somebody's checkpoints.
        found = fs.find(root, maxdepth=2, detail=True)
        ours = re.compile(
            re.escape(root.rstrip("/")) + r"/[0-9a-f]{64}(\.parts/\d{6})?\.safetensors(\.\d+\.partial)?"
        )
        return {path: int(entry["size"]) for path, entry in found.items() if ours.fullmatch(path)}

    def _read_file(self, name: str) -> dict[str, np.ndarray] | None:
        fs, path = self._place(name)
        try:
            with fs.open(path, "rb") as file:
                return load(file.read())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(
                f"the store '{self.url}' cannot be read ({error.strerror or error}), expected a folder; choose another --store"
            ) from None
        except SafetensorError as error:
            logger.warning("the stored file %s is damaged (%s) and will be computed again", path, error)
            return None

    def _write_file(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        fs, path = self._place(name)
        write_atomically(fs, path, save({key: np.ascontiguousarray(value) for key, value in arrays.items()}))


def open_store(url: str | None = None) -> Store:
    """The store at `url`, or the default one."""
    return Store(url or default_store_url())


def write_atomically(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    """Write to a neighbouring name, then rename: a reader sees the whole file or none."""
    partial = f"{path}.{os.getpid()}.partial"
    try:
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        with fs.open(partial, "wb") as file:
            file.write(data)
        fs.mv(partial, path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}): expected a writable place with room; choose another"
        ) from None


def write_file(path: Path, data: bytes) -> None:
    """`write_atomically` for a local path.

    Raises:
        InputError: the path cannot be written, or is a folder: a file would be moved into it.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder, expected a file or nothing there; choose another path")
    write_atomically(fsspec.filesystem("file"), path.resolve().as_posix(), data)


def save_record(record: Any, path: str | Path) -> None:
    """Save a frozen dataclass: its arrays as tensors, the rest as JSON in the header.

    Nested dataclasses, tuples, dicts with string keys, numbers, strings, None and numpy arrays are kept.
    """
    write_file(Path(path), record_to_bytes(record))


def record_to_bytes(record: Any) -> bytes:
    """What `save_record` writes."""
    arrays: dict[str, np.ndarray] = {}
    tree = _pack(record, "", arrays)
    header = json.dumps(
        {"schema_version": SCHEMA_VERSION, "record": tree}, sort_keys=True, ensure_ascii=False
    )
    return save(arrays, metadata={HEADER: header})


def load_record(path: str | Path, types: Mapping[str, type]) -> Any:
    """Load what `save_record` wrote.

    Args:
        path: the file.
        types: the dataclasses that may occur in it, by class name; nothing else is ever constructed.

    Raises:
        StoreError: the file is missing, is no record, or has a newer schema than this version knows.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise StoreError(
            f"no saved result at {path} ({type(error).__name__}): expected a file that this package wrote; check the path"
        ) from None
    return record_from_bytes(data, types, path)


def record_from_bytes(data: bytes, types: Mapping[str, type], path: str | Path) -> Any:
    """What `record_to_bytes` packed; `path` is named in errors."""
    try:
        arrays = load(data)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][HEADER])
        schema, record = header["schema_version"], header["record"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path} is no saved result ({type(error).__name__}): expected a safetensors file whose {HEADER} header holds one; "
            "load vectors with load_vector, or make it again"
        ) from None
    check_schema(schema, path)
    return _unpack(record, arrays, types, Path(path))


def check_schema(found: Any, path: str | Path) -> None:
    """Refuse files of a newer version by name.

    Raises:
        StoreError: `found` is newer than `SCHEMA_VERSION`, or no number.
    """
    if not isinstance(found, int):
        raise StoreError(
            f"{path} has schema version {found!r}, expected a number up to {SCHEMA_VERSION}; make it again"
        )
    if found > SCHEMA_VERSION:
        raise StoreError(
            f"{path} has schema version {found}, but this package knows versions up to {SCHEMA_VERSION}; "
            "install a newer empathy-probes"
        )


def _pack(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {
            f.name: _pack(getattr(value, f.name), f"{name}/{f.name}", arrays)
            for f in dataclasses.fields(value)
        }
        return {"class": type(value).__name__, "fields": fields}
    if isinstance(value, np.ndarray):
        arrays[name.lstrip("/")] = np.ascontiguousarray(value)
        return {"array": name.lstrip("/")}
    if isinstance(value, tuple | list):
        # An entry that names itself gives its arrays readable names in the file.
        names = [getattr(entry, "key", index) for index, entry in enumerate(value)]
        return {
            "tuple": [_pack(entry, f"{name}/{key}", arrays) for key, entry in zip(names, value, strict=True)]
        }
    if isinstance(value, Mapping):
        return {"dict": {key: _pack(entry, f"{name}/{key}", arrays) for key, entry in value.items()}}
    if value is None or isinstance(value, str | int | float | bool):
        return {"value": value}
    raise TypeError(f"{name or 'the record'} is a {type(value).__name__}, which a record cannot hold")


def _unpack(
    tree: Mapping[str, Any], arrays: Mapping[str, np.ndarray], types: Mapping[str, type], path: Path
) -> Any:
    (kind, content), *rest = sorted(tree.items(), key=lambda entry: entry[0] == "fields")
    if kind == "class":
        if content not in types:
            raise StoreError(
                f"{path} holds a '{content}', expected one of {', '.join(sorted(types))}; load it with the function for that result"
            )
        fields = {key: _unpack(entry, arrays, types, path) for key, entry in rest[0][1].items()}
        known = {f.name for f in dataclasses.fields(types[content]) if f.init}
        needed = {
            f.name for f in dataclasses.fields(types[content]) if f.init and f.default is f.default_factory
        }
        if not needed <= fields.keys() <= known:
            raise StoreError(
                f"{path} holds a '{content}' with the fields {', '.join(sorted(fields))}, expected {', '.join(sorted(known))}: another "
                "version of this package wrote it; make it again"
            )
        return types[content](**fields)
    if kind == "array":
        return arrays[content]
    if kind == "tuple":
        return tuple(_unpack(entry, arrays, types, path) for entry in content)
    if kind == "dict":
        return {key: _unpack(entry, arrays, types, path) for key, entry in content.items()}
    return content
