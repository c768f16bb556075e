"""Can this checkpoint be measured, and with what?  A few short runs, one verdict each.

Every check is a law that the measurements rest on, tried on this model: one BOS, padding that changes no contrast, spans that are
found where they are, hooks that fire and leave nothing, writes that sum to the stream, a replay that equals the plain run. `ok`: holds. `warn`: some
questions cannot be asked, and the words say which. `fail`: numbers of this model would be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch

from empathy_probes.batches import Pool, pad_tokens
from empathy_probes.errors import EmpathyProbesError, InputError
from empathy_probes.interventions import add_vector
from empathy_probes.models import Model, load_model
from empathy_probes.prompts import Style, has_chat_template, render, render_texts
from empathy_probes.sites import COMPONENTS, HEADS, Site
from empathy_probes.stimuli import Message, Stimulus, StimulusSet

Verdict = Literal["ok", "warn", "fail"]
TEXTS = (
    "The old man saw a red bird by the river .",
    "A dog .",
    "There was rain , and then the sun stood over the road again .",
)
SPAN = "red bird"
# Of a contrast between two texts, by which padding may change it: rounding of another order of sums, and no more.
PADDING = {"float32": 1e-3, "float64": 1e-6}
PADDING_HALF = 0.1
# Largest activation of a float16 model that leaves room below 65,504.
NEAR_OVERFLOW = 20_000.0


@dataclass(frozen=True)
class Check:
    """One law, tried."""

    check: str
    verdict: Verdict
    words: str
    """What was seen, and what it means."""


@dataclass(frozen=True)
class Checkup:
    """What a model was found fit for."""

    model: str
    architecture: str
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst of all."""
        order: tuple[Verdict, ...] = ("ok", "warn", "fail")
        return max((c.verdict for c in self.checks), key=order.index)

    def to_frame(self) -> pd.DataFrame:
        """One row per check: check, verdict, words."""
        return pd.DataFrame(
            [(c.check, c.verdict, c.words) for c in self.checks], columns=["check", "verdict", "words"]
        )


def examine(
    source: str | Path | tuple[Any, Any],
    *,
    revision: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Checkup:
    """Load a checkpoint and try on it what measurements rest on; arguments as in `load_model`.

    Raises:
        InputError: nothing loadable is there.
    """
    return examine_model(
        load_model(source, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    )


def examine_model(model: Model) -> Checkup:
    """The same of a model that is loaded already."""
    with torch.inference_mode():
        checks = tuple(check(model) for check in CHECKS)
    return Checkup(model.name, model.architecture, checks)


def _size(model: Model) -> Check:
    return Check(
        "model", "ok",
        f"{model.architecture}, {model.n_layers} blocks, d_model {model.d_model}, {model.n_heads} heads, {model.n_parameters:,} "
        f"parameters, context {model.n_ctx}, {'LayerNorm' if model.centres else 'RMSNorm'}",
    )  # fmt: skip


def _bos(model: Model) -> Check:
    tokenizer = model.tokenizer
    bos = tokenizer.bos_token_id
    if bos is None:
        return Check(
            "bos",
            "warn",
            "the tokenizer has no BOS: the first token of a text takes its place; read none there",
        )
    try:
        ids = render_texts(tokenizer, TEXTS[:1])[0].ids
    except InputError as error:
        return Check("bos", "fail", str(error))
    if ids.count(bos) == 1 and ids[0] == bos:
        return Check("bos", "ok", f"plain texts begin with one {tokenizer.bos_token}")
    return Check(
        "bos", "warn",
        f"{tokenizer.bos_token} stands {ids.count(bos)} times in a plain text, expected once at its start; right where the model "
        "was trained so",
    )  # fmt: skip


def _last_states(model: Model, left: bool | None) -> torch.Tensor:
    """State of every text's last token after the last block; each text alone where `left` is None."""
    rows = [prompt.ids for prompt in render_texts(model.tokenizer, TEXTS)]
    site, found = Site(model.n_layers - 1), []
    for group in [[row] for row in rows] if left is None else [rows]:
        batch = pad_tokens(group, model.device, left=bool(left))
        pool = Pool.of([[len(row) - 1] for row in group], batch)
        found.append(model.run(batch, [site], last_layer=site.layer, pool=pool).acts[site])
    return torch.cat(found)


def _padding(model: Model) -> Check:
    alone = _last_states(model, None)
    allowed = PADDING.get(model.dtype, PADDING_HALF)
    misses = {}
    for side, left in (("right", False), ("left", True)):
        together = _last_states(model, left)
        # On contrasts: raw states have hidden such errors behind their common part.
        wanted, got = (states[1:] - states[:1] for states in (alone, together))
        misses[side] = ((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()
    said = ", ".join(f"{side} {miss:.1g}" for side, miss in misses.items())
    wrong = [side for side, miss in misses.items() if not miss <= allowed]
    if wrong:
        return Check(
            "padding", "fail",
            f"padding on the {' and '.join(wrong)} changes contrasts beyond rounding (relative change: {said}; allowed {allowed:g})",
        )  # fmt: skip
    return Check("padding", "ok", f"texts padded or alone give the same contrasts (relative change: {said})")


def _dtype(model: Model) -> Check:
    sites = [Site(layer) for layer in range(-1, model.n_layers)]
    batch = model.tokenize(TEXTS)
    acts = model.run(batch, sites, last_layer=model.n_layers - 1).acts
    states = torch.stack([acts[site][batch.mask.bool()].float() for site in sites])
    if not states.isfinite().all():
        layer = int((~states.isfinite()).any(-1).any(-1).nonzero()[0]) - 1
        return Check(
            "dtype",
            "fail",
            f"NaN or infinity after block {layer} in {model.dtype}; load it with --dtype float32",
        )
    largest = f"{model.dtype} on {model.device.type}, activations up to {states.abs().max().item():.3g}"
    if model.dtype == "float16" and states.abs().max() > NEAR_OVERFLOW:
        return Check(
            "dtype", "warn", f"{largest}: longer texts may overflow 65,504; use --dtype bfloat16 or float32"
        )
    if model.dtype == "float16" and model.device.type == "cpu":
        return Check("dtype", "warn", f"{largest}: slow on a CPU; --dtype float32 is several times faster")
    return Check("dtype", "ok", largest)


def _turn(read: Literal["span", "message"]) -> StimulusSet:
    """One exchange, read at a span of the user's turn or at the whole of it."""
    messages = (Message("user", TEXTS[0]),)
    where: str | int = SPAN if read == "span" else 0
    return StimulusSet(
        "doctor", (Stimulus("text", "text", messages, TEXTS[0], 0.0, read=where),), "binary", read
    )


def _located(model: Model, style: Style) -> Check:
    name = "spans" if style == "raw" else "template"
    try:
        found = [
            len(render(model.tokenizer, _turn(read), style, "user")[0].read) for read in ("span", "message")
        ]
    except InputError as error:
        return Check(name, "fail" if style == "chat" else "warn", str(error))
    tokens = f"{found[0]} token{'s' if found[0] > 1 else ''}"
    if style == "raw":
        return Check(name, "ok", f"a span of a plain text is found again by its offsets ({SPAN!r}: {tokens})")
    return Check(
        name,
        "ok",
        f"the chat template renders a turn, with at most one BOS, and spans are found in it ({SPAN!r}: {tokens})",
    )


def _spans(model: Model) -> Check:
    return _located(model, "raw")


def _template(model: Model) -> Check:
    if not has_chat_template(model.tokenizer):
        return Check(
            "template", "warn", "no chat template: as the aligned side only raw text can be measured"
        )
    return _located(model, "chat")


def _places(model: Model) -> Iterator[str]:
    """Components that this architecture has."""
    for component in (*COMPONENTS, HEADS):
        try:
            model.run(TEXTS[:1], [Site(layer, component) for layer in range(model.n_layers)])
        except (EmpathyProbesError, RuntimeError, AttributeError):
            continue
        yield component


def _hooks(model: Model) -> Check:
    present = tuple(_places(model))
    absent = [name for name in (*COMPONENTS, HEADS) if name not in present]
    if "resid_post" in absent:
        return Check(
            "hooks", "fail", f"nothing is seen at {', '.join(absent)}: this architecture cannot be read"
        )
    plain = model.run(TEXTS).logits
    sites = [Site(layer, name) for name in present for layer in range(model.n_layers)]
    read = model.run(TEXTS, [Site(-1), *sites]).logits
    assert plain is not None and read is not None
    if not torch.equal(plain, read):
        return Check("hooks", "fail", "reading activations changes the logits")
    if absent:
        return Check(
            "hooks",
            "warn",
            f"fire at {', '.join(present)} of every block; there is no {', '.join(absent)} in this architecture",
        )
    return Check("hooks", "ok", f"fire at {', '.join(present)} of every block, and reading changes nothing")


def _edits(model: Model) -> Check:
    plain = model.run(TEXTS).logits
    assert plain is not None
    real = model.tokenize(TEXTS).mask.bool()
    unheard = []
    for name in _places(model):
        site = Site(model.n_layers // 2, name)
        ones = torch.ones(model.width(name), device=model.device)
        nothing = model.run(TEXTS, write={site: add_vector(ones, 0.0)}).logits
        something = model.run(TEXTS, write={site: lambda acts: acts * 0}).logits
        assert nothing is not None and something is not None
        # Written through attention's output, resid_mid is a difference of sums, and not the same to the last bit.
        miss = (nothing[real].float() - plain[real].float()).abs().max().item()
        if not miss <= 0.05 * plain[real].float().std().item():
            return Check("edits", "fail", f"adding nothing at {name} changes the logits")
        if torch.equal(something, plain):
            unheard.append(name)
    after = model.run(TEXTS).logits
    assert after is not None
    if not torch.equal(after, plain):
        return Check("edits", "fail", "the model is not as it was before the edits")
    if unheard:
        return Check(
            "edits",
            "fail",
            f"emptying {', '.join(unheard)} of a block changes no logit: edits do not reach the model there",
        )
    return Check(
        "edits", "ok", "an edit changes the logits, adding nothing does not, and nothing is left behind"
    )


def _refusal(name: str, holds: str, lost: str, refusal: str | None) -> Check:
    return Check(name, "ok", holds) if refusal is None else Check(name, "warn", f"{lost}: {refusal}")


def _additivity(model: Model) -> Check:
    return _refusal(
        "additivity", "embedding, heads and MLPs sum to the residual stream", "attribution to components is refused",
        model.additivity_refusal,
    )  # fmt: skip


def _replay(model: Model) -> Check:
    return _refusal(
        "replay", "continuing from a state equals the plain run", "stitching and patching are refused", model.replay_refusal
    )  # fmt: skip


def _packing(model: Model) -> Check:
    return _refusal(
        "packing", "two continuations can share a row with their prompt", "every continuation runs in a row of its own, slower",
        model.pack_refusal,
    )  # fmt: skip


CHECKS: tuple[Callable[[Model], Check], ...] = (
    _size, _bos, _padding, _dtype, _spans, _template, _hooks, _edits, _additivity, _replay, _packing,
)  # fmt: skip
