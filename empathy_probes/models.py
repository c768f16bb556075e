"""Load a checkpoint and run it: the only file that knows TransformerLens and hooks.

Both models of a pair are loaded the same way, with raw weights, so that their residual streams keep their
basis. `Model.run` reads and writes activations at sites, stops after the last layer that is needed, and
`Model.replay` continues from a given state without recomputing the blocks before it. A model leaves every
verb as it entered, also after an exception.

Replay captures the arguments each block was called with (masks and rotary tables differ per layer) and
calls the remaining blocks with them; at load, one batch checks that replay equals the plain forward pass (`Model.replay_refusal`).
"""

from __future__ import annotations

import contextlib
import copy as copying
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from empathy_probes.batches import Pool, TokenBatch, pad_tokens, row_positions
from empathy_probes.checkpoints import (
    DTYPES,
    first_line,
    load_pretrained,
    load_tokenizer,
    split_revision,
    with_adapter,
)
from empathy_probes.errors import EmpathyProbesError, InputError
from empathy_probes.hooks import (
    Place,
    at_positions,
    edit_hook,
    edit_mid_hook,
    keep_call,
    keep_hook,
    read_hook,
    repeat_rows,
)
from empathy_probes.interventions import Edit
from empathy_probes.prompts import Style, render_messages, render_texts
from empathy_probes.sites import HEADS, Site

logger = logging.getLogger(__name__)
# Of states times directions that `head_slopes` holds at once.
SLOPE_NUMBERS = 1 << 22
# Config entries that name or describe a checkpoint without changing what it computes.
_IDLE_CONFIG = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


@dataclass(frozen=True)
class Run:
    """What one forward pass left behind."""

    acts: dict[Site, Tensor]
    """`[batch pos d_model]` per site read, or `[batch d_model]` where it was pooled."""
    logits: Float[Tensor, "batch pos d_vocab"] | None
    """None where `last_layer` stopped the run before the unembedding."""
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...] | None
    """The arguments of every block, for `Model.replay`; None unless asked for."""
    batch: TokenBatch | None = None
    """What was run, where calls were kept."""


class _Stop(Exception):
    """Ends a forward pass once the last layer that anyone needs has run."""


@dataclass(frozen=True)
class Model:
    """A checkpoint that can be run."""

    name: str
    """What the caller called it: hub id, or folder."""
    bridge: Any
    """The TransformerLens `TransformerBridge`, raw weights."""
    tokenizer: Any
    revision: str | None
    weights: str
    """SHA-256 over names, shapes and values of all parameters, cast to float32."""
    config: Mapping[str, Any]
    """The checkpoint's configuration, without entries that only name it."""
    _place: Place = field(default_factory=Place, repr=False, compare=False)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return int(self.bridge.cfg.n_layers)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.bridge.cfg.d_model)

    @property
    def n_heads(self) -> int:
        """Attention heads of a block (of queries, where keys and values have fewer)."""
        return int(self.bridge.cfg.n_heads)

    @property
    def d_head(self) -> int:
        """Width of one head."""
        return int(self.bridge.cfg.d_head)

    def width(self, component: str) -> int:
        """Width of what is read at a component: the residual stream's, or that of all heads side by side."""
        return self.n_heads * self.d_head if component == HEADS else self.d_model

    @property
    def d_vocab(self) -> int:
        """Rows of the embedding."""
        return int(self.bridge.original_model.get_input_embeddings().weight.shape[0])

    @property
    def n_ctx(self) -> int:
        """Longest text in tokens."""
        return int(self.bridge.cfg.n_ctx)

    @property
    def architecture(self) -> str:
        """Class name of the Hugging Face model."""
        return str(self.bridge.cfg.architecture)

    @property
    def dtype(self) -> str:
        """Name of the parameters' dtype."""
        return str(next(self.bridge.parameters()).dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.bridge.parameters()).device

    @property
    def n_parameters(self) -> int:
        """Number of weights, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.bridge.original_model.parameters())

    @property
    def centres(self) -> bool:
        """Whether the normalisation before each read subtracts the mean over d_model (LayerNorm)."""
        # Asked of the module that runs: the bridge's own configuration says "LN" for several RMSNorm families. The
        # final norm is of the blocks' kind and, unlike `ln1`, is there in post-norm families (OLMo 2) too.
        norm = self.bridge.ln_final
        return "rms" not in type(getattr(norm, "original_component", norm)).__name__.lower()

    @cached_property
    def fingerprint(self) -> str:
        """Digest of everything that decides an activation: weights, configuration, dtype."""
        plain = json.dumps([self.weights, dict(self.config), self.dtype], sort_keys=True, default=str)
        return hashlib.sha256(plain.encode()).hexdigest()

    @cached_property
    def tokenizer_digest(self) -> str:
        """Digest of vocabulary, merges, special tokens and normalisation."""
        if getattr(self.tokenizer, "is_fast", False):
            plain = self.tokenizer.backend_tokenizer.to_str()
        else:
            plain = json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        return hashlib.sha256(plain.encode()).hexdigest()

    @property
    def template_digest(self) -> str | None:
        """Digest of the chat template, None without one."""
        template = getattr(self.tokenizer, "chat_template", None)
        return hashlib.sha256(str(template).encode()).hexdigest() if template else None

    @cached_property
    def replay_refusal(self) -> str | None:
        """Why `replay` cannot be trusted for this model; None where one batch showed it equal to a forward pass."""
        from empathy_probes.selfchecks import replay_refusal

        return replay_refusal(self)

    @cached_property
    def pack_refusal(self) -> str | None:
        """Why two continuations cannot share a row with their prompt in this model; None where one batch showed they can."""
        from empathy_probes.selfchecks import pack_refusal

        return pack_refusal(self)

    @cached_property
    def additivity_refusal(self) -> str | None:
        """Why the residual stream is not the sum of what embedding, heads and MLPs write; None where one batch showed it is."""
        from empathy_probes.selfchecks import additivity_refusal

        return additivity_refusal(self)

    def tokenize(self, texts: Sequence[str]) -> TokenBatch:
        """Token ids of plain texts, right-padded, with the special tokens the tokenizer itself adds."""
        return pad_tokens([prompt.ids for prompt in render_texts(self.tokenizer, texts)], self.device)

    def run(
        self,
        prompts: TokenBatch | Sequence[str],
        read: Sequence[Site] = (),
        write: Mapping[Site, Edit] | None = None,
        last_layer: int | None = None,
        pool: Pool | None = None,
        capture: bool = False,
    ) -> Run:
        """One forward pass.

        Args:
            prompts: texts, or a padded batch of ids.
            read: sites whose activations are kept, after any edit there.
            write: an edit per site.
            last_layer: stop after this block (inclusive); the unembedding never runs.
            pool: average each read over these positions, inside the read.
            capture: keep what `replay` needs; the run must be of full depth.

        Raises:
            InputError: a site lies beyond the model or beyond `last_layer`.
            EmpathyProbesError: a site never fired in this architecture.
        """
        batch = prompts if isinstance(prompts, TokenBatch) else self.tokenize(prompts)
        depth = self._check_depth(last_layer, -1)
        self._check_sites([*read, *(write or {})], -1, depth)
        acts: dict[Site, Tensor] = {}
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        logits = None
        with self._hooked(read, write or {}, acts, pool), contextlib.ExitStack() as stack:
            if capture:
                if depth < self.n_layers - 1:
                    raise InputError(
                        "capture got a run that stops early, expected one of full depth; drop last_layer"
                    )
                for block in self.bridge.blocks:
                    handle = block.register_forward_pre_hook(keep_call(calls), with_kwargs=True)
                    stack.callback(handle.remove)
            if last_layer is not None:
                stack.callback(self._stop_after(last_layer).remove)
            with contextlib.suppress(_Stop):
                logits = self.bridge(batch.ids, use_cache=False, **self._attention(batch))
        self._check_fired(read, acts)
        return Run(acts, logits, tuple(calls), batch) if capture else Run(acts, logits, None)

    def _attention(self, batch: TokenBatch) -> dict[str, Tensor]:
        """What decides which tokens see which, and their positions."""
        if batch.visible is None:
            return {"attention_mask": batch.mask}
        dtype = next(self.bridge.parameters()).dtype
        hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=batch.ids.device)
        mask = torch.where(batch.visible, torch.zeros_like(hidden), hidden)[:, None]
        return {"attention_mask": mask, "position_ids": row_positions(batch)}

    def attention_output(
        self, layer: int
    ) -> tuple[Float[Tensor, "d_attn d_model"], Float[Tensor, " d_model"] | None]:
        """Output projection of a block's attention: it writes `z @ weight + bias`, head h by rows h·d_head and on of `weight`."""
        inner = self.bridge.blocks[layer].attn.o.original_component
        weight = inner.weight.detach()
        bias = getattr(inner, "bias", None)
        # torch's Linear keeps [out in], GPT-2's Conv1D [in out].
        stored = weight.T if isinstance(inner, torch.nn.Linear) else weight
        return stored, None if bias is None else bias.detach()

    def replay(
        self,
        run: Run,
        state: Float[Tensor, "batch pos d_model"],
        after: int,
        read: Sequence[Site] = (),
        write: Mapping[Site, Edit] | None = None,
        last_layer: int | None = None,
        pool: Pool | None = None,
    ) -> Run:
        """Continue from `state`, taken to be the residual stream after block `after`, to the logits.

        Args:
            run: a captured run of this model on the same tokens.
            state: any state of that shape; a batch that is a multiple of the captured one repeats it.
            after: the block the state stands after; −1 for the input of block 0.
            read, write, last_layer, pool: as in `run`; sites must lie in blocks beyond `after`.
        """
        if run.calls is None or run.batch is None:
            raise InputError(
                "replay got a run without captured calls, expected one made with capture=True; run it again so"
            )
        if not -1 <= after < self.n_layers:
            raise InputError(
                f"replay got a state after block {after} of '{self.name}', expected −1 to {self.n_layers - 1}; choose one of these"
            )
        depth = self._check_depth(last_layer, after)
        self._check_sites([*read, *(write or {})], after + 1, depth)
        acts: dict[Site, Tensor] = {}
        captured = len(run.batch.ids)
        self._place.positions = row_positions(run.batch)
        with self._hooked(read, write or {}, acts, pool):
            for layer in range(after + 1, depth + 1):
                args, kwargs = run.calls[layer]
                kwargs = {key: repeat_rows(value, captured, state.shape[0]) for key, value in kwargs.items()}
                if "hidden_states" in kwargs:
                    out = self.bridge.blocks[layer](*args, **{**kwargs, "hidden_states": state})
                else:
                    out = self.bridge.blocks[layer](
                        state, *(repeat_rows(a, captured, state.shape[0]) for a in args[1:]), **kwargs
                    )
                state = out[0] if isinstance(out, tuple) else out
        self._check_fired(read, acts)
        return Run(acts, self._unembed(state) if last_layer is None else None, None)

    @contextlib.contextmanager
    def editing(
        self, write: Mapping[Site, Edit], where: Callable[[Int[Tensor, "batch pos"]], Tensor] | None = None
    ) -> Iterator[None]:
        """Keep edits in place over every run inside: `run`, `replay`, `generate`, also with a cache of keys and values.

        Several may be nested; each leaves as it entered, whatever happens.

        Args:
            write: an edit per site.
            where: from positions, counted from each row's first token, to whether a position is edited; all by default.

        Raises:
            InputError: a site lies beyond the model.
            EmpathyProbesError: nothing ran inside that an edit applied to.
        """
        self._check_sites(list(write), -1, self.n_layers - 1)
        # Counted before the edits: a place that is passed but not chosen by `where` is no edit.
        edited: set[Site] = set()
        edits = {site: at_positions(site, edit, where, self._place, edited) for site, edit in write.items()}
        with self._following(), self._hooked((), edits, {}, None):
            yield
        silent = [site for site in write if site not in edited]
        if silent:
            raise EmpathyProbesError(
                f"the edit at {silent[0]} never fired in '{self.name}': got no run of this model that reaches the chosen positions of "
                "that layer, expected one inside the `with`; run or generate with this model inside it"
            )

    @contextlib.contextmanager
    def unedited(self) -> Iterator[None]:
        """Pass over the edits of any `editing` around: what the model itself computes."""
        before, self._place.unedited = self._place.unedited, True
        try:
            yield
        finally:
            self._place.unedited = before

    @contextlib.contextmanager
    def _following(self) -> Iterator[None]:
        """Keep track of the positions that each forward pass runs."""

        def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            mask, given = kwargs.get("attention_mask"), kwargs.get("position_ids")
            if ids is None:
                self._place.positions = None
            elif mask is not None and mask.ndim == 2:
                self._place.positions = (mask.cumsum(-1) - 1)[:, -ids.shape[1] :]
            elif given is not None:
                self._place.positions = given.expand(len(ids), -1)
            else:
                self._place.positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)

        handle = self.bridge.original_model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def generate(
        self,
        prompt: str,
        *,
        template: str = "raw",
        max_new_tokens: int = 60,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """What the model answers or goes on with, without the prompt.

        Args:
            prompt: a text.
            template: raw, or chat: the text is the user's turn in the model's own chat template.
            max_new_tokens: at most so many.
            temperature: 0 takes the likeliest token each time.
            seed: of the draws.
        """
        return self.generate_batch(
            [prompt], template=template, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        )[0]

    def generate_batch(
        self,
        prompts: Sequence[str],
        *,
        template: str = "raw",
        max_new_tokens: int = 60,
        temperature: float = 0.0,
        seed: int = 0,
        cache: bool = True,
    ) -> list[str]:
        """As `generate`, for several texts at once.

        Raises:
            InputError: no chat template, an unknown one, or a prompt that leaves no room.
        """
        if template not in ("raw", "chat"):
            raise InputError(f"unknown template '{template}': expected raw or chat; choose one")
        style: Style = "chat" if template == "chat" else "raw"
        rows = [prompt.ids for prompt in render_messages(self.tokenizer, prompts, style)]
        longest = max(map(len, rows))
        if longest + max_new_tokens > self.n_ctx:
            raise InputError(
                f"{longest} tokens of prompt and {max_new_tokens} new ones were asked of '{self.name}', expected at most "
                f"{self.n_ctx} in all; shorten either"
            )
        batch = pad_tokens(rows, self.device, left=True)
        stop = self.tokenizer.eos_token_id
        options: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            options["temperature"] = temperature
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            ids = self.bridge.original_model.generate(
                batch.ids,
                attention_mask=batch.mask,
                max_new_tokens=max_new_tokens,
                pad_token_id=stop if stop is not None else 0,
                use_cache=cache,
                **options,
            )
        return list(self.tokenizer.batch_decode(ids[:, batch.ids.shape[1] :], skip_special_tokens=True))

    def head(self, states: Float[Tensor, "k d_model"]) -> Float[Tensor, "k d_vocab"]:
        """Logits of single states after the last block: final norm and unembedding."""
        return self._unembed(states[:, None])[:, 0]

    def head_rows(self, states: Float[Tensor, "k d_model"], rows: Int[Tensor, "k r"]) -> Float[Tensor, "k r"]:
        """Some logits of each state; no other row of the unembedding is computed."""
        normed = self.bridge.ln_final(states[:, None])[:, 0]
        weight, bias = (
            self.bridge.unembed.original_component.weight,
            self.bridge.unembed.original_component.bias,
        )
        # One small product per state where rows differ between states, one for all where they are the same.
        if len(rows) and (rows == rows[0]).all():
            logits = normed @ weight[rows[0]].T
        else:
            logits = torch.einsum("kd,krd->kr", normed, weight[rows])
        return self._cap(logits if bias is None else logits + bias[rows])

    def head_slopes(
        self, states: Float[Tensor, "k d_model"], directions: Float[Tensor, "m d_model"]
    ) -> Float[Tensor, "m d_vocab"]:
        """How fast every logit changes as states after the last block move along each direction: the mean over the states.

        An exact derivative, through the final norm, its gain and the unembedding; before a soft cap, which keeps the order.
        """

        def move(direction: Tensor) -> Tensor:
            def norm(x: Tensor) -> Tensor:
                return self.bridge.ln_final(x[:, None])[:, 0]

            return torch.func.jvp(norm, (states,), (direction.expand_as(states),))[1].mean(0)

        with torch.no_grad():
            normed = torch.func.vmap(move, chunk_size=max(1, SLOPE_NUMBERS // states.numel()))(directions)
            return normed @ self.bridge.unembed.original_component.weight.T

    def _unembed(self, state: Tensor) -> Tensor:
        return self._cap(self.bridge.unembed(self.bridge.ln_final(state)))

    def _cap(self, logits: Tensor) -> Tensor:
        cap = getattr(self.bridge.original_model.config, "final_logit_softcapping", None)
        return (logits / cap).tanh() * cap if cap else logits

    @cached_property
    def _hook_names(self) -> frozenset[str]:
        return frozenset(self.bridge.hook_dict)

    def _check_sites(self, sites: Sequence[Site], first: int, last: int) -> None:
        for site in sites:
            if site.head is not None and site.head >= self.n_heads:
                raise InputError(
                    f"{site} does not exist in '{self.name}': a block has {self.n_heads} heads, expected 0 to {self.n_heads - 1}; "
                    "choose one of these"
                )
            if not first <= site.layer <= last:
                raise InputError(
                    f"{site} is outside the layers this run covers ({first} to {last} of {self.n_layers} blocks in "
                    f"'{self.name}'): expected a layer in that range; choose another site or run further"
                )
            if site.hook_name not in self._hook_names:
                raise EmpathyProbesError(
                    f"{site} does not exist in '{self.name}' ({self.architecture}): this architecture has no such place; "
                    "choose another site"
                )

    def _check_depth(self, last_layer: int | None, first: int) -> int:
        if last_layer is not None and not first <= last_layer < self.n_layers:
            raise InputError(
                f"last_layer got {last_layer}, expected {first} to {self.n_layers - 1}, the blocks of '{self.name}'; leave it out for all"
            )
        return self.n_layers - 1 if last_layer is None else last_layer

    def _check_fired(self, sites: Sequence[Site], acts: Mapping[Site, Tensor]) -> None:
        silent = [site for site in sites if site not in acts]
        if silent:
            raise EmpathyProbesError(
                f"{silent[0]} never fired in '{self.name}' ({self.architecture}): this architecture has no such place; "
                "choose another site"
            )

    def _stop_after(self, layer: int) -> Any:
        def stop(*_: Any) -> None:
            raise _Stop

        # The input of block 0 is read inside block 0, so −1 runs that block too.
        return self.bridge.blocks[max(layer, 0)].register_forward_hook(stop)

    @contextlib.contextmanager
    def _hooked(
        self, read: Sequence[Site], write: Mapping[Site, Edit], acts: dict[Site, Tensor], pool: Pool | None
    ) -> Iterator[None]:
        """Hooks for these reads and edits, removed whatever happens. Edits get a copy: see the facts on in-place edits."""
        hooks: list[tuple[str, Callable[..., Tensor | None]]] = []
        fired: set[Site] = set()
        for site in write:
            if site.component == "resid_mid":
                # The hook sits on ln2's input: a returned tensor would miss the skip path. Attention's output
                # reaches both, so the edit is made there: attn_out ← edit(resid_pre + attn_out) − resid_pre.
                before: dict[str, Tensor] = {}
                hooks.append((f"blocks.{site.layer}.hook_resid_pre", keep_hook(before)))
                hooks.append(
                    (f"blocks.{site.layer}.hook_attn_out", edit_mid_hook(site, write[site], before, fired))
                )
            else:
                hooks.append((site.hook_name, edit_hook(site, write[site], fired, self.d_head)))
        hooks += [(site.hook_name, read_hook(site, acts, pool, self.d_head)) for site in read]
        ran: set[int] = set()
        with self.bridge.hooks(fwd_hooks=hooks), contextlib.ExitStack() as stack:
            for block in {max(site.layer, 0) for site in write}:
                handle = self.bridge.blocks[block].register_forward_pre_hook(lambda *_, b=block: ran.add(b))
                stack.callback(handle.remove)
            yield
        # Where nothing ran, the architecture is not to blame: `editing` says so.
        silent = [site for site in write if site not in fired and max(site.layer, 0) in ran]
        if silent:
            raise EmpathyProbesError(
                f"the edit at {silent[0]} never fired in '{self.name}' ({self.architecture}): this architecture has no "
                "such place; choose another site"
            )


# ---------------------------------------------------------------------------------------------------------
# Loading


def load_model(
    source: str | Path | tuple[Any, Any],
    *,
    revision: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    copy: bool = True,
    name: str | None = None,
) -> Model:
    """Load a checkpoint with raw weights.

    Args:
        source: a hub id, `ID@REVISION`, a folder, or `(hf_model, tokenizer)`.
        revision: hub revision; the part after `@` says the same.
        dtype: a name such as float32; the checkpoint's own by default.
        device: cpu, cuda, mps; the best there is by default.
        adapter: a LoRA/PEFT folder, merged into the weights (`peft` extra).
        trust_remote_code: run code that comes with the checkpoint.
        copy: deep-copy a model that was handed over, because loading rewires it; False to hand it over for good.
        name: what to call it; the source by default.

    Raises:
        InputError: nothing loadable is there; the message says why.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"unknown dtype '{dtype}': expected one of {', '.join(DTYPES)}; choose one of these")
    place = _checked_device(device)
    if isinstance(source, tuple):
        hf_model, tokenizer = source
        label = name or type(hf_model).__name__
        hf_model = copying.deepcopy(hf_model) if copy else hf_model
    else:
        path, tagged = split_revision(source)
        revision = revision or tagged
        label = name or str(source)
        hf_model, tokenizer = load_pretrained(path, revision, dtype, trust_remote_code)
    if adapter is not None:
        hf_model = with_adapter(hf_model, adapter)
        if (Path(adapter) / "tokenizer_config.json").is_file():  # a chat adapter brings its own chat template
            tokenizer = load_tokenizer(str(adapter), None, trust_remote_code)
        label = name or f"{label}+{Path(adapter).name}"
    if dtype is not None:
        hf_model = hf_model.to(DTYPES[dtype])
    hf_model.eval()
    if place == "cpu" and next(hf_model.parameters()).dtype == torch.float16:
        logger.warning(
            "'%s' is float16, which a CPU runs slowly: --dtype float32 is several times faster here", label
        )
    weights = _weights_digest(hf_model)
    config = {key: value for key, value in hf_model.config.to_dict().items() if key not in _IDLE_CONFIG}
    bridge = _boot(hf_model, tokenizer, place, label)
    model = Model(label, bridge, tokenizer, revision, weights, json.loads(json.dumps(config, default=str)))
    if model.replay_refusal:
        logger.warning("'%s' can be read but not continued from a state: %s", label, model.replay_refusal)
    return model


def _checked_device(device: str | None) -> str:
    """The device asked for, once a tensor could be put there; the best one where none was."""
    if device is None:
        return _best_device()
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"device '{device}' cannot be used ({first_line(error)}), expected cpu, cuda or mps where there is one; choose another"
        ) from None
    return device


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _boot(hf_model: Any, tokenizer: Any, device: str, label: str) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    # A fresh config may lack this, and several adapters are chosen by it alone.
    hf_model.config.architectures = [type(hf_model).__name__]
    # The bridge would otherwise reload the tokenizer by name and drop its chat template and added tokens.
    kept = copying.deepcopy(tokenizer)
    kept.init_kwargs.setdefault("name_or_path", label)
    kept.init_kwargs["add_bos_token"] = True
    try:
        return TransformerBridge.boot_transformers(
            "model",
            hf_model=hf_model.to(device),
            tokenizer=kept,
            dtype=next(hf_model.parameters()).dtype,
            device=device,
        )
    except (ValueError, NotImplementedError, KeyError, AttributeError) as error:
        raise InputError(
            f"TransformerLens cannot run '{label}' ({type(hf_model).__name__}: {first_line(error)}), expected an architecture it "
            "supports; choose another model"
        ) from None


def _weights_digest(hf_model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(hf_model.named_parameters()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
