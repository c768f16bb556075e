"""The store: whole entries or none, records that come back as they were."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from empathy_probes.errors import InputError, StoreError
from empathy_probes.store import (
    HEADER,
    SCHEMA_VERSION,
    Store,
    default_store_url,
    digest_of,
    load_record,
    save_record,
)


@dataclass(frozen=True)
class Inner:
    key: str
    values: np.ndarray


@dataclass(frozen=True)
class Outer:
    name: str
    parts: tuple[Inner, ...]
    numbers: dict[str, Any] = field(default_factory=dict)
    nothing: None = None


TYPES = {"Inner": Inner, "Outer": Outer}
RECORD = Outer(
    "naïve",
    (Inner("one", np.arange(6.0).reshape(2, 3)), Inner("two", np.array([True]))),
    {"x": 1.5, "y": [1, 2]},
)


@pytest.mark.parametrize("url", ["{tmp}/store", "memory://store-{name}"])
def test_entries_come_back_and_clear_removes_only_them(tmp_path: Path, url: str) -> None:
    store, key, other = (
        Store(url.format(tmp=tmp_path, name=tmp_path.name)),
        digest_of("one"),
        digest_of("other"),
    )
    assert store.read(key) is None and store.info().entries == 0
    store.write_part(key, 0, {"a": np.zeros(2)})
    assert store.info().parts == 1 and len(store.read_parts(key)) == 1 and store.next_part(key) == 1
    store.write(key, {"a": np.arange(3)})
    found = store.read(key)
    assert found is not None and np.array_equal(found["a"], np.arange(3)) and store.info().parts == 0
    theirs = [
        tmp_path / "store" / name for name in ("README.md", "model.safetensors", "hub/model.safetensors")
    ]
    if url.startswith("{tmp}"):
        for path in theirs:
            path.parent.mkdir(exist_ok=True)
            path.write_text("somebody's checkpoint")
        (tmp_path / "store" / f"{key}.safetensors.77.partial").write_text("left by a kill")
    store.write_part(other, 0, {"a": np.zeros(2)})
    assert store.clear().parts == 1
    assert store.info().size == 0 and store.read(key) is None
    if url.startswith("{tmp}"):
        left = {path for path in (tmp_path / "store").rglob("*") if path.is_file()}
        assert left == set(theirs)


def test_a_damaged_entry_counts_as_absent(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write("k", {"a": np.arange(300)})
    path = tmp_path / "k.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    assert store.read("k") is None


def test_a_store_that_cannot_be_opened_or_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        Store("nosuchscheme://x").read("k")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        Store(str(tmp_path / "file")).write("k", {"a": np.zeros(1)})
    with pytest.raises(InputError, match="cannot be read"):
        Store(str(tmp_path / "file")).read("k")
    with pytest.raises(InputError, match="is a file"):
        Store(str(tmp_path / "file")).info()


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    save_record(RECORD, tmp_path / "r.safetensors")
    found = load_record(tmp_path / "r.safetensors", TYPES)
    assert found.name == RECORD.name and found.nothing is None and found.numbers == {"x": 1.5, "y": (1, 2)}
    for ours, theirs in zip(RECORD.parts, found.parts, strict=True):
        assert ours.key == theirs.key and ours.values.dtype == theirs.values.dtype
        assert np.array_equal(ours.values, theirs.values)
    save_record(found, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "r.safetensors").read_bytes()


def test_records_that_are_none_or_newer_or_foreign_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no saved result at"):
        load_record(tmp_path / "nothing", TYPES)
    (tmp_path / "bad").write_bytes(b"not safetensors at all")
    with pytest.raises(StoreError, match="is no saved result"):
        load_record(tmp_path / "bad", TYPES)
    with pytest.raises(StoreError, match="IsADirectoryError"):
        load_record(tmp_path, TYPES)
    # A vector's file has the same header and no record in it.
    save_file(
        {"direction": np.zeros((1, 2))},
        tmp_path / "vector",
        metadata={HEADER: json.dumps({"schema_version": 1})},
    )
    with pytest.raises(StoreError, match="load vectors with load_vector"):
        load_record(tmp_path / "vector", TYPES)
    save_record(RECORD, tmp_path / "r")
    data = (tmp_path / "r").read_bytes()
    old, new = (
        f'schema_version\\": {SCHEMA_VERSION}'.encode(),
        f'schema_version\\": {SCHEMA_VERSION + 8}'.encode(),
    )
    assert old in data
    (tmp_path / "newer").write_bytes(data.replace(old, new))
    with pytest.raises(
        StoreError,
        match=f"version {SCHEMA_VERSION + 8}, but this package knows versions up to {SCHEMA_VERSION}",
    ):
        load_record(tmp_path / "newer", TYPES)
    with pytest.raises(StoreError, match="holds a 'Inner'"):
        load_record(tmp_path / "r", {"Outer": Outer})


def test_the_default_store_is_the_checkouts_then_the_environments_then_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMPATHY_PROBES_STORE", "memory://mine")
    assert default_store_url() == "memory://mine"
    monkeypatch.delenv("EMPATHY_PROBES_STORE")
    assert default_store_url().endswith("empathy_probes")
    monkeypatch.chdir(Path(__file__).resolve().parent.parent)
    assert default_store_url().endswith("activations")


@dataclass(frozen=True)
class Kept:
    x: int
    y: int = 2


def test_a_record_of_another_version_is_refused_by_name_and_worked_out_again_in_the_store(
    tmp_path: Path,
) -> None:
    @dataclass(frozen=True)
    class Other:
        x: int
        z: int

    types = {"Other": Kept}
    save_record(Other(1, 3), tmp_path / "r.safetensors")
    with pytest.raises(StoreError, match="another version of this package wrote it"):
        load_record(tmp_path / "r.safetensors", types)
    store = Store(str(tmp_path))
    key = "0" * 64
    assert store.remember_record(key, lambda: Other(1, 3), types) == Other(1, 3)
    assert store.remember_record(key, lambda: Kept(5), {"Kept": Kept, **types}) == Kept(5)
    assert store.remember_record(key, lambda: pytest.fail("kept already"), {"Kept": Kept}) == Kept(5)
