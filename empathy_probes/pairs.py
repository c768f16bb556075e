"""A base model and the aligned model that came from it, checked to be comparable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from empathy_probes.errors import InputError
from empathy_probes.models import Model, load_model


@dataclass(frozen=True)
class ModelPair:
    """A base model and the aligned model that came from it."""

    base: Model
    aligned: Model

    @property
    def models(self) -> tuple[Model, Model]:
        """Base, then aligned."""
        return self.base, self.aligned

    @property
    def identical(self) -> bool:
        """Whether both hold the same tensors."""
        return self.base.weights == self.aligned.weights


def load_pair(
    base: str | Path | tuple[Any, Any],
    aligned: str | Path | tuple[Any, Any] | None = None,
    *,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    allow_identical: bool = False,
    trust_remote_code: bool = False,
) -> ModelPair:
    """Load a base model and its aligned descendant, the same way.

    Args:
        base: as in `load_model`.
        aligned: as in `load_model`; None with an adapter on the base.
        adapter: a LoRA/PEFT folder that makes the aligned model out of `aligned`, or of `base` where that is None.
        dtype, device, trust_remote_code: for both models.
        allow_identical: accept two equal checkpoints, which are otherwise a mistake.

    Raises:
        InputError: the two cannot be compared; the message names both sides.
    """
    if aligned is None and adapter is None:
        raise InputError("load_pair got no aligned model: expected a second model or an adapter; name one")
    options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    return make_pair(
        load_model(base, **options),
        load_model(base if aligned is None else aligned, adapter=adapter, **options),
        allow_identical=allow_identical,
    )


def make_pair(base: Model, aligned: Model, *, allow_identical: bool = False) -> ModelPair:
    """Pair two loaded models, or say why they cannot be compared.

    Raises:
        InputError: different architecture, width, depth, dtype or vocabulary, or the same weights.
    """
    remedy = "choose a base model and a model tuned from it"
    for what, of_base, of_aligned in (
        ("architecture", base.architecture, aligned.architecture),
        ("d_model", base.d_model, aligned.d_model),
        ("number of blocks", base.n_layers, aligned.n_layers),
    ):
        if of_base != of_aligned:
            raise InputError(
                f"the pair does not match in {what}: base '{base.name}' has {of_base}, aligned '{aligned.name}' has "
                f"{of_aligned}, expected the same; {remedy}"
            )
    if base.dtype != aligned.dtype:
        raise InputError(
            f"the pair does not match in dtype: base '{base.name}' has {base.dtype}, aligned '{aligned.name}' has "
            f"{aligned.dtype}, expected the same; choose one for both with dtype (--dtype)"
        )
    _check_vocabularies(base, aligned, remedy)
    pair = ModelPair(base, aligned)
    if pair.identical and not allow_identical:
        raise InputError(
            f"base '{base.name}' and aligned '{aligned.name}' have identical weights, expected two different models; "
            "check the paths, or allow it (--allow-identical) to see what nothing looks like"
        )
    return pair


def _check_vocabularies(base: Model, aligned: Model, remedy: str) -> None:
    ours, theirs = base.tokenizer.get_vocab(), aligned.tokenizer.get_vocab()
    added = {**base.tokenizer.get_added_vocab(), **aligned.tokenizer.get_added_vocab()}
    common = min(base.d_vocab, aligned.d_vocab)
    plain = [token for token in ours.keys() | theirs.keys() if token not in added]
    different = sorted(token for token in plain if ours.get(token) != theirs.get(token))
    if different:
        token = different[0]
        raise InputError(
            f"the pair does not match in vocabulary: {len(different)} tokens differ, for example {token!r} is "
            f"{ours.get(token)} in base '{base.name}' and {theirs.get(token)} in aligned '{aligned.name}', expected the "
            f"same ids apart from added special tokens; {remedy}"
        )
    if any(ours[token] >= common for token in plain if token in ours):
        raise InputError(
            f"the pair does not match in vocabulary: base '{base.name}' has {base.d_vocab} embedding rows and aligned "
            f"'{aligned.name}' has {aligned.d_vocab}, expected both to cover the tokenizer; {remedy}"
        )
