"""Checkpoints as files: what a hub id or a folder holds, as a transformers model or as plain tensors, and back.

Weights are read as numbers only, from safetensors or a pickle that may hold nothing else (`weights_only`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from empathy_probes.errors import InputError

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
# What transformers, peft and safetensors raise on a checkpoint that is not whole or does not fit its config.
UNLOADABLE = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    RuntimeError,
    TypeError,
    AttributeError,
    SafetensorError,
)


def first_line(error: Exception) -> str:
    """What a library said, short enough for one sentence."""
    return str(error).strip().split("\n")[0][:300]


def split_revision(source: str | Path) -> tuple[str, str | None]:
    """`ID@REVISION` in its parts; a folder's name is left as it is.

    >>> split_revision("EleutherAI/pythia-160m@step143000")
    ('EleutherAI/pythia-160m', 'step143000')
    """
    if Path(source).exists():
        return str(source), None
    path, _, revision = str(source).partition("@")
    return path, revision or None


def load_tokenizer(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer of a hub id or folder, in one sentence if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except UNLOADABLE as error:
        raise InputError(
            f"cannot load a tokenizer from '{path}' ({first_line(error)}): expected tokenizer files beside the model; check the "
            "name, or download it first"
        ) from None


def load_pretrained(
    path: str, revision: str | None, dtype: str | None, trust_remote_code: bool
) -> tuple[Any, Any]:
    """Model and tokenizer of a hub id or folder, with all of the model's tensors.

    Raises:
        InputError: nothing loadable is there; the message says why.
    """
    folder = Path(path)
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"'{path}' is no checkpoint folder: got no config.json in it, expected config.json, weights and "
                "tokenizer files; check the path"
            )
        _check_config(folder / "config.json")
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
        raise InputError(f"no model at '{path}': no such folder, and no hub id has this form; check the path")
    from transformers import AutoModelForCausalLM

    # Of weights that the hub has as .bin only, transformers would ask a service there for another file, in a thread of its own.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    tokenizer = load_tokenizer(path, revision, trust_remote_code)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=DTYPES[dtype] if dtype else "auto",
            output_loading_info=True,
            **options,
        )
    except UnpicklingError:
        raise InputError(
            f"the weights of '{path}' are a pickle that holds more than numbers, expected tensors only, better safetensors; fetch "
            "the checkpoint elsewhere"
        ) from None
    except UNLOADABLE as error:
        raise InputError(
            f"cannot load a model from '{path}' ({first_line(error)}): expected a folder or hub id of a causal language model "
            "with its weights and a tokenizer; check the name, or download it first"
        ) from None
    hf_model, report = loaded
    if report["missing_keys"]:
        # transformers would fill these with random numbers and go on.
        raise InputError(
            f"the checkpoint '{path}' lacks {len(report['missing_keys'])} tensors, for example "
            f"{sorted(report['missing_keys'])[0]}, expected all of its model's; fetch the checkpoint again"
        )
    return hf_model, tokenizer


def _check_config(path: Path) -> None:
    """Refuse a damaged config.json by its name: the first to read it is the tokenizer, which would be blamed."""
    try:
        got = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        why = first_line(error)
    else:
        if isinstance(got, dict):
            return
        why = f"got a {type(got).__name__}"
    raise InputError(
        f"'{path}' is no model configuration ({why}): expected a JSON object; fetch the checkpoint again"
    )


def with_adapter(hf_model: Any, adapter: str | Path) -> Any:
    """The model with a LoRA/PEFT folder merged into its weights (`peft` extra)."""
    try:
        from peft import PeftModel
    except ImportError:
        raise InputError(
            "an adapter was given but the package peft is not installed: expected the extra; pip install 'empathy-probes[peft]'"
        ) from None
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise InputError(
            f"'{adapter}' is no adapter folder: got no adapter_config.json in it, expected a PEFT adapter; check the path"
        )
    try:
        return PeftModel.from_pretrained(hf_model, str(adapter)).merge_and_unload()
    except UNLOADABLE as error:
        raise InputError(
            f"the adapter '{adapter}' does not fit its base model ({first_line(error)}): expected an adapter made for this "
            "architecture; choose the base it was trained on"
        ) from None


def open_checkpoint(source: str | Path) -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    """Read a checkpoint as data: its configuration, its tensors in float32 (a tied head included), its tokenizer.

    Args:
        source: a hub id, `ID@REVISION` or a folder.

    Raises:
        InputError: nothing loadable is there.
    """
    hf_model, tokenizer = load_pretrained(*split_revision(source), "float32", False)
    tensors = {name: tensor.detach().clone() for name, tensor in hf_model.state_dict().items()}
    return hf_model.config.to_dict(), tensors, tokenizer


def build_checkpoint(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """A Hugging Face model with this configuration and exactly these tensors.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {key: value for key, value in config.items() if key not in {"model_type", "dtype", "torch_dtype"}}
    hf_model = AutoModelForCausalLM.from_config(AutoConfig.for_model(str(config["model_type"]), **plain))
    report = hf_model.load_state_dict(dict(tensors), strict=False)
    if report.missing_keys or report.unexpected_keys:
        raise ValueError(f"tensors missing {report.missing_keys}, unknown {report.unexpected_keys}")
    return hf_model.float().eval()


def save_checkpoint(hf_model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Write an ordinary checkpoint folder: config, safetensors, tokenizer."""
    hf_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
