"""Other tools' vector files: read, written, and what each means by a layer.

Ours                 safetensors with a JSON header; rows are 0-based blocks (`vectors`).
GGUF                 control vectors as llama.cpp and repeng read them: `direction.N` is added after 0-based block N, at every
                     position. N = 0 is refused by the loader, so that block 0 cannot be exported. Metadata is not looked at
                     there; our header travels in one key of it and is read back.
persona-vectors      `.pt` of `[n_layers + 1, d]`: index 0 is the embedding, index i what block i − 1 left.
CAA                  a folder of `vec_layer_{i}.pt`, each `[d]`: what 0-based block i left.
NumPy                `.npz`, or a folder of `.npy`: the number after layer, block or L in a name, or its only number, is the 0-based
                     block; one array `[n_layers, d]` has a row per block.
Neuronpedia          JSON: arguments of its client's `NPVector.new`. Its layers are inputs (`hook_resid_pre`): what block L left is
                     the input of L + 1, what the last block left has no place, and the input of 0 no block left.

All of these mean the residual stream after a block. A format is one entry of `FORMATS`; numbers stay in raw activation units, and where a
file says nothing else a direction's own length is one dose.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import re
import shutil
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from empathy_probes.errors import InputError, StoreError
from empathy_probes.store import HEADER, write_file
from empathy_probes.vectors import SteeringVector, load_vector, make_vector, vector_from_header

logger = logging.getLogger(__name__)
ARCHITECTURE = "controlvector"
CAA_NAME = "vec_layer_{}.pt"
LAYER_NUMBER = re.compile(r"(?:layer|block|(?<![a-z])l)[ _.-]?(\d+)", re.IGNORECASE)
# layer_-1 is the last one of a depth that the name does not say.
LONE_NUMBER = re.compile(r"(?:\D*[\W_])?(?<![\W_]-)(\d+)(?:[\W_]\D*)?")
HOOK = "hook_resid_pre"
# What torch, NumPy and gguf raise at damaged files, found by damaging some at random.
DAMAGED = (
    OSError, EOFError, ValueError, TypeError, LookupError, RuntimeError, AssertionError, pickle.UnpicklingError, struct.error,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip

Reader = Callable[[Path, int | None], SteeringVector]
"""From a file, and the block of a vector that does not say where it belongs, to all that is in it."""
Writer = Callable[[SteeringVector, Path], Mapping[int, str]]
"""Writes a vector and says which blocks of it the format cannot hold, and why."""


@dataclass(frozen=True)
class Written:
    """What a file got."""

    path: Path
    format: str
    """A key of `FORMATS`."""
    layers: tuple[int, ...]
    """0-based blocks written."""
    left_out: tuple[str, ...]
    """What of its numbers could not be carried, one sentence each."""


def read_vector(path: str | Path, format: str | None = None, layer: int | None = None) -> SteeringVector:
    """Read a vector from any known format.

    Args:
        path: a file, or a folder of one file per layer.
        format: a key of `FORMATS`; told by the path where None.
        layer: the 0-based block of a vector that does not say where it belongs; of any other, the block wanted.

    Raises:
        InputError: the file is not of that format, or says another block than `layer`; the message says what was found.
        StoreError: a file of ours that is damaged or of a newer version.
    """
    path = Path(path)
    name = format or _format_of(path)
    reader = _entry(name)[0]
    if not path.exists():
        raise InputError(
            f"no vector at {path}: expected a file or folder of the format '{name}'; check the path"
        )
    found = reader(path, layer)
    return found if layer is None else found.at(layer)


def write_vector(vector: SteeringVector, path: str | Path, format: str | None = None) -> Written:
    """Write a vector in any known format.

    Args:
        vector: at the residual stream after blocks, unless the format is our own.
        path: the file, or the folder where a format has one file per layer.
        format: a key of `FORMATS`; told by the path where None.

    Returns:
        What was written, and what the format could not hold.

    Raises:
        InputError: the format cannot hold this vector at all, or the path cannot be written.
    """
    path = Path(path)
    name = format or _format_of(path)
    writer = _entry(name)[1]
    if name != OWN and vector.site != "resid_post":
        raise InputError(
            f"format '{name}' got a vector at {vector.site}, expected one at resid_post, the only site it knows; use {OWN}"
        )
    missing = writer(vector, path)
    left_out = [f"block {layer} is left out: {why}" for layer, why in missing.items()]
    # Other tools add the rows as they are, so a multiple stays one; what it is a multiple of only our header says.
    doses = np.linalg.norm(vector.relative, axis=1)
    doses = doses[[layer not in missing for layer in vector.layers] & (doses > 0)]
    if name not in HEADED and not np.allclose(doses, 1):
        left_out.append(
            f"the length of one dose is left out: rows of {doses.min():.3g} to {doses.max():.3g} doses are written as they are, and each "
            "is one dose when it is read"
        )
    for sentence in left_out:
        logger.warning("%s: %s", path, sentence)
    return Written(
        path, name, tuple(layer for layer in vector.layers if layer not in missing), tuple(left_out)
    )


def _entry(name: str) -> tuple[Reader, Writer]:
    if name not in FORMATS:
        raise InputError(
            f"unknown vector format '{name}': expected one of {', '.join(FORMATS)}; choose one of these"
        )
    return FORMATS[name]


def _format_of(path: Path) -> str:
    if path.suffix in SUFFIXES:
        if path.suffix == ".pt" and re.fullmatch(CAA_NAME.format(r"\d+"), path.name):
            return "caa"
        return SUFFIXES[path.suffix]
    inside = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    if any(re.fullmatch(CAA_NAME.format(r"\d+"), name) for name in inside):
        return "caa"
    if any(name.endswith(".npy") for name in inside):
        return "numpy"
    raise InputError(
        f"the format of {path} cannot be told from its name, expected a suffix among {', '.join(SUFFIXES)}, or a folder with one file "
        f"per layer; name the format, one of {', '.join(FORMATS)}"
    )


# ---------------------------------------------------------------- ours


def _read_own(path: Path, layer: int | None) -> SteeringVector:
    return load_vector(path)


def _write_own(vector: SteeringVector, path: Path) -> Mapping[int, str]:
    vector.save(path)
    return {}


# ---------------------------------------------------------------- GGUF


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise InputError(
            "a GGUF file was asked for but the package gguf is not installed, expected it; pip install 'empathy-probes[gguf]'"
        ) from None
    return gguf


def _read_gguf(path: Path, layer: int | None) -> SteeringVector:
    """`direction.N` → block N; of numbers that are neither F32 nor F16 only the bytes would be seen."""
    keys = ("general.architecture", f"{ARCHITECTURE}.model_hint", f"{ARCHITECTURE}.{HEADER}")
    try:
        reader = _gguf().GGUFReader(path)
        fields = [reader.get_field(key) for key in keys]
        architecture, hint, own = ("" if field is None else str(field.contents()) for field in fields)
    except DAMAGED as error:
        raise InputError(
            f"{path} is no GGUF file ({error}), expected a control vector; check the path"
        ) from None
    if architecture != ARCHITECTURE:
        raise InputError(
            f"{path} is a GGUF file of the architecture '{architecture}', expected '{ARCHITECTURE}'; give a control vector"
        )
    rows = {}
    for tensor in reader.tensors:
        name, kind, shape = tensor.name, tensor.tensor_type.name, [int(size) for size in tensor.shape]
        number = re.fullmatch(r"direction\.([1-9]\d*)", name)
        if number is None or kind not in ("F32", "F16") or len(shape) != 1:
            raise InputError(
                f"{path} holds '{name}' of type {kind} and shape {shape}, expected direction.N of N from 1 on, of type F32 or F16 and one "
                "axis; export it again"
            )
        rows[int(number[1])] = np.array(tensor.data, np.float32)
    found = _from_rows(rows, path, model={"name": hint})
    if not own:
        return found
    whole = np.zeros((found.layers[-1] + 1, found.d_model), np.float32)
    whole[list(found.layers)] = found.direction
    try:
        headed = vector_from_header(whole, json.loads(own), path)
    except json.JSONDecodeError as error:
        raise StoreError(
            f"{path} has a {HEADER} header that is not JSON ({error}), expected what this package writes; make it again"
        ) from None
    if headed.layers != found.layers:
        raise StoreError(
            f"{path} holds directions of the blocks {list(found.layers)} and names {list(headed.layers)}, expected the same; make it again"
        )
    return headed


def _write_gguf(vector: SteeringVector, path: Path) -> Mapping[int, str]:
    """Block N → `direction.N`, 1-D F32; block 0 is left out, and alone it is refused."""
    gguf = _gguf()
    layers = [layer for layer in vector.layers if layer > 0]
    if not layers:
        raise InputError(
            f"the vector '{vector.concept}' is at block 0 alone, which a GGUF control vector cannot hold (llama.cpp refuses direction.0), "
            "expected a later block; choose another layer or format"
        )
    kept = replace(
        vector, direction=vector.direction[-len(layers) :], unit=vector.unit[-len(layers) :], layers=tuple(layers),
        rms=vector.rms[-len(layers) :],
    )  # fmt: skip
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(partial, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", _model_hint(vector.model))
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(layers))
        writer.add_string(f"{ARCHITECTURE}.{HEADER}", json.dumps(kept.header(), sort_keys=True))
        for layer, row in zip(layers, kept.direction, strict=True):
            writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(row, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        partial.unlink(missing_ok=True)
    return {0: "llama.cpp refuses direction.0"} if len(layers) < len(vector.layers) else {}


def _model_hint(model: Mapping[str, Any]) -> str:
    """The kind of model as llama.cpp's tools write it, such as llama; only for people to read."""
    architecture = re.sub(r"(ForCausalLM|LMHeadModel)$", "", str(model.get("architecture", "")))
    return architecture.lower() or str(model.get("name", ""))


# ---------------------------------------------------------------- torch files


def _load_pt(path: Path) -> Any:
    """What the file holds; a real tensor as a dense one of float32."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        plain = isinstance(found, torch.Tensor) and not found.is_complex()
        return found.detach().to_dense().float() if plain else found
    except DAMAGED as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise InputError(
            f"{path} cannot be read as tensors ({reason}), expected a file of tensors alone: anything else could run code; save the tensor again"
        ) from None


def _read_persona(path: Path, layer: int | None) -> SteeringVector:
    """Index i → block i − 1; index 0, the embedding, has no block."""
    found = _load_pt(path)
    if (
        not isinstance(found, torch.Tensor)
        or found.dtype != torch.float32
        or found.ndim != 2
        or len(found) < 2
    ):
        raise InputError(
            f"{path} holds {_what(found)}, expected a tensor [n_layers + 1, d_model] whose index 0 is the embedding; name the format it is in"
        )
    rows = found.numpy()
    note = ("index 0, the embedding, is no block",) if rows[0].any() else ()
    return _from_rows(dict(enumerate(rows[1:])), path, notes=note, n_layers=len(rows) - 1)


def _write_persona(vector: SteeringVector, path: Path) -> Mapping[int, str]:
    """Block L → index L + 1; blocks that the vector has not, and the embedding, are zero."""
    deep = vector.layers[-1] + 1 if vector.n_layers is None else vector.n_layers
    whole = torch.zeros(deep + 1, vector.d_model)
    whole[[layer + 1 for layer in vector.layers]] = torch.as_tensor(vector.direction)
    write_file(path, _pt_bytes(whole))
    return {}


def _read_caa(path: Path, layer: int | None) -> SteeringVector:
    """`vec_layer_{i}.pt` → block i; a single file of another name needs `layer`."""
    if not path.is_dir():
        return _from_rows({_block(_said(path.stem), path, layer): _row(_load_pt(path), path)}, path)
    files = {
        int(m[1]): file
        for file in sorted(path.iterdir())
        if (m := re.fullmatch(CAA_NAME.format(r"(\d+)"), file.name))
    }
    return _from_rows({block: _row(_load_pt(file), file) for block, file in files.items()}, path)


def _write_caa(vector: SteeringVector, path: Path) -> Mapping[int, str]:
    files = {
        CAA_NAME.format(layer): _pt_bytes(torch.as_tensor(row).clone())
        for layer, row in zip(vector.layers, vector.direction, strict=True)
    }
    _write_folder(path, files, CAA_NAME.format("*"))
    return {}


def _pt_bytes(tensor: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


# ---------------------------------------------------------------- NumPy


def _read_numpy(path: Path, layer: int | None) -> SteeringVector:
    """The number of a name → that block; one array of several rows → a row per block."""
    try:
        if path.is_dir():
            arrays = {file.stem: _load_arrays(file) for file in sorted(path.glob("*.npy"))}
        else:
            loaded = _load_arrays(path)
            arrays = {path.stem: loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except DAMAGED as error:
        raise InputError(
            f"{path} cannot be read as arrays ({error}), expected .npy or .npz without objects; save it again"
        ) from None
    if len(arrays) == 1:
        ((name, array),) = arrays.items()
        # arr_0 is what NumPy calls an array that was given no name.
        said = None if name == "arr_0" else _said(name)
        if np.ndim(array) != 2 or len(array) == 1:
            row = _row(array, path)
            named = (
                _block(_said(path.stem), path, layer) if said is None else _block(said, path / name, layer)
            )
            return _from_rows({named: row}, path)
        if LAYER_NUMBER.search(name):
            raise InputError(
                f"{path} holds {len(array)} rows named '{name}', expected one vector for one layer, or a row per block and no layer in the "
                "name; rename it"
            )
        return _from_rows({i: _row(row, path) for i, row in enumerate(array)}, path, n_layers=len(array))
    rows: dict[int, Float[np.ndarray, " d_model"]] = {}
    for name, array in arrays.items():
        block = _block(_said(name), path / name, None)
        if block in rows:
            raise InputError(f"{path} holds two arrays for block {block}, expected one each; rename one")
        rows[block] = _row(array, path)
    return _from_rows(rows, path)


def _load_arrays(path: Path) -> Any:
    # From bytes: np.load leaves a damaged .npz open.
    return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)


def _write_numpy(vector: SteeringVector, path: Path) -> Mapping[int, str]:
    rows = {f"layer_{layer}": row for layer, row in zip(vector.layers, vector.direction, strict=True)}
    if path.suffix == ".npy":
        raise InputError(f"{path} would hold one array without layers, expected .npz or a folder; choose one")
    buffer = io.BytesIO()
    if path.suffix == ".npz":
        np.savez(buffer, **rows)
        write_file(path, buffer.getvalue())
        return {}
    files = {}
    for name, row in rows.items():
        buffer = io.BytesIO()
        np.save(buffer, row)
        files[f"{name}.npy"] = buffer.getvalue()
    _write_folder(path, files, "*.npy")
    return {}


# ---------------------------------------------------------------- Neuronpedia


def _read_neuronpedia(path: Path, layer: int | None) -> SteeringVector:
    """Layer L → block L − 1, as `_write_neuronpedia` has it."""
    try:
        entries = json.loads(path.read_bytes())
        entries = entries if isinstance(entries, list) else [entries]
        found = [(entry["layer_num"], entry["hook_type"], np.array(entry["vector"])) for entry in entries]
        about = {(str(entry["label"]), str(entry["model_id"])) for entry in entries}
        strengths = {entry.get("default_steer_strength") or 1 for entry in entries} - {1}
    except DAMAGED as error:
        raise InputError(
            f"{path} cannot be read as Neuronpedia vectors ({type(error).__name__}: {error}), expected a JSON list of objects with label, "
            "model_id, layer_num, hook_type and vector; check the file"
        ) from None
    if len(about) > 1:
        raise InputError(
            f"{path} holds {len(about)} vectors ({'; '.join(' of '.join(one) for one in sorted(about))}), expected the layers of one; split "
            "the file"
        )
    rows: dict[int, Float[np.ndarray, " d_model"]] = {}
    for number, hook, values in found:
        if hook != HOOK or type(number) is not int or number < 1 or number - 1 in rows:
            raise InputError(
                f"{path} holds a vector for layer_num {number} of {hook}, expected each layer once, from 1 on, of {HOOK}: the input of "
                "layer 0 no block left; take it out"
            )
        rows[number - 1] = _row(values, path)
    notes = tuple(f"default_steer_strength {strength} is left out" for strength in sorted(strengths, key=str))
    label, model = about.pop() if about else ("", "")
    return _from_rows(rows, path, concept=label, model={"name": model}, notes=notes)


def _write_neuronpedia(vector: SteeringVector, path: Path) -> Mapping[int, str]:
    """What block L left → the input of block L + 1; what the last block left has no place there."""
    deep = vector.n_layers
    layers = [layer for layer in vector.layers if deep is None or layer < deep - 1]
    if not layers:
        raise InputError(
            f"the vector '{vector.concept}' is after the last block alone, which is no block's input ({HOOK}), expected an earlier block; "
            "choose another layer or format"
        )
    entries = [
        {
            "label": vector.concept, "model_id": str(vector.model.get("name", "")), "layer_num": layer + 1,
            "hook_type": HOOK, "vector": [float(x) for x in vector.at(layer).direction[0]],
            "default_steer_strength": 1.0,
        }
        for layer in layers
    ]  # fmt: skip
    write_file(path, json.dumps(entries, indent=1, ensure_ascii=False).encode())
    return {
        layer: f"what it leaves is no block's input ({HOOK})"
        for layer in vector.layers
        if layer not in layers
    }


# ---------------------------------------------------------------- shared


def _row(found: Any, path: Path) -> Float[np.ndarray, " d_model"]:
    array = np.asarray(found) if isinstance(found, torch.Tensor | np.ndarray) else np.array(None)
    array = array[0] if array.ndim == 2 and len(array) == 1 else array
    if array.ndim != 1 or array.dtype.kind not in "fiu":
        raise InputError(
            f"{path} holds {_what(found)} for one layer, expected one vector [d_model] of numbers; name the format it is in"
        )
    return array.astype(np.float32)


def _what(found: Any) -> str:
    if isinstance(found, torch.Tensor | np.ndarray):
        return f"{found.dtype} of shape {list(found.shape)}"
    return f"a {type(found).__name__}"


def _said(name: str) -> int | None:
    """The block that a name says: the number after layer, block or L, else its only number, standing alone.

    >>> [_said(name) for name in ("L12_seed0", "model2_layer_1", "joy_7", "gpt2_joy", "3_of_8")]
    [12, 1, 7, None, None]
    """
    found = {int(number) for number in LAYER_NUMBER.findall(name)}
    if not found and (lone := LONE_NUMBER.fullmatch(name)):
        found = {int(lone[1])}
    return found.pop() if len(found) == 1 else None


def _block(said: int | None, path: Path, layer: int | None) -> int:
    """`layer` counts only where the name says no block."""
    if said is None:
        if layer is None:
            raise InputError(
                f"{path} does not say which block it belongs to, expected a name such as layer_7; rename it, or say the block of a single "
                "vector with layer (--layer)"
            )
        return layer
    if layer not in (None, said):
        raise InputError(
            f"{path} is named as the vector of block {said}, but layer {layer} was asked for, expected the same; leave layer out, or "
            "rename it"
        )
    return said


def _from_rows(
    rows: Mapping[int, Float[np.ndarray, " d_model"]], path: Path, **described: Any
) -> SteeringVector:
    lengths = sorted({len(row) for row in rows.values()})
    if len(lengths) != 1 or lengths == [0]:
        got = f"vectors of the lengths {lengths}" if rows else "no vector"
        raise InputError(f"{path} holds {got}, expected vectors of one length; check the file")
    layers = sorted(rows)
    return make_vector(
        np.stack([rows[layer] for layer in layers]), layers, **{"concept": path.stem, **described}
    )


def _write_folder(path: Path, files: Mapping[str, bytes], kind: str) -> None:
    """A file per layer, into a folder without any of the kind: all that lie there are read as one vector."""
    if held := sorted(path.glob(kind)):
        raise InputError(
            f"the folder {path} already holds {held[0].name}, expected no {kind}: it would be read as a layer of the same vector; choose "
            "another folder"
        )
    path = path.resolve()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        for name, data in files.items():
            write_file(partial / name, data)
        path.mkdir(exist_ok=True)
        for name in files:
            (partial / name).replace(path / name)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unwritable(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(
        f"{path} cannot be written ({reason}): expected a writable place with room; choose another"
    )


OWN = "empathy_probes"
HEADED = (OWN, "gguf")
"""Formats that carry our header."""
FORMATS: dict[str, tuple[Reader, Writer]] = {
    OWN: (_read_own, _write_own),
    "gguf": (_read_gguf, _write_gguf),
    "persona_vectors": (_read_persona, _write_persona),
    "caa": (_read_caa, _write_caa),
    "numpy": (_read_numpy, _write_numpy),
    "neuronpedia": (_read_neuronpedia, _write_neuronpedia),
}
"""Name of a format → how it is read and written."""
SUFFIXES = {
    ".safetensors": OWN, ".gguf": "gguf", ".pt": "persona_vectors", ".npz": "numpy", ".npy": "numpy", ".json": "neuronpedia",
}  # fmt: skip
