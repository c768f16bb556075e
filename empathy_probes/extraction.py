"""Stimuli + model → pooled activations: planned, batched, resumable, cached.

Prompts are sorted by length and cut into batches of at most `TOKEN_BUDGET` padded tokens. Each batch is one
forward pass under `inference_mode` that stops after the last layer needed and pools inside the read, so
memory is n × layers × d_model and never tokens × …. Finished batches go to the store as parts; an
interrupted extraction reads them and goes on, and ends with the same bytes, because the same prompts make the same batches (unless memory ran out and one was halved).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from empathy_probes.activations import Activations
from empathy_probes.batches import Pool, pad_tokens
from empathy_probes.errors import InputError, NonFiniteError
from empathy_probes.models import Model
from empathy_probes.prompts import RenderedPrompt
from empathy_probes.sites import Site
from empathy_probes.store import Store, digest_of

TOKEN_BUDGET = 8192
PART_SECONDS = 2.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What an extraction will do."""

    batches: tuple[tuple[int, ...], ...]
    """Indices of prompts, longest first, so that memory runs out at once or never."""
    n_tokens: int
    """Real tokens."""
    n_padded: int
    """Tokens that run, padding included."""
    size: int
    """Bytes of the pooled result."""


def plan_extraction(
    prompts: Sequence[RenderedPrompt], n_rows: int, d_model: int, budget: int = TOKEN_BUDGET
) -> Plan:
    """Cut prompts into batches.

    Args:
        prompts: what to run.
        n_rows: vectors kept per prompt (sites × layers).
        d_model: width of one vector.
        budget: padded tokens per batch; a longer prompt runs alone.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].ids), i))
    batches: list[list[int]] = []
    for i in order:
        width = len(prompts[batches[-1][0]].ids) if batches else 0
        if batches and width * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return Plan(
        batches=tuple(tuple(batch) for batch in batches),
        n_tokens=sum(len(prompt.ids) for prompt in prompts),
        n_padded=sum(len(prompts[batch[0]].ids) * len(batch) for batch in batches),
        size=len(prompts) * n_rows * d_model * 4,
    )


def check_prompts(model: Model, prompts: Sequence[RenderedPrompt], concept: str) -> None:
    """Refuse prompts a model cannot take, before anything runs.

    Raises:
        InputError: a prompt is longer than the context, or has a token id outside the vocabulary.
    """
    for prompt in prompts:
        if len(prompt.ids) > model.n_ctx:
            raise InputError(
                f"concept '{concept}', item '{prompt.item}' has {len(prompt.ids)} tokens, expected at most {model.n_ctx}, "
                f"the context of '{model.name}'; shorten or remove the text"
            )
        if max(prompt.ids) >= model.d_vocab:
            raise InputError(
                f"concept '{concept}', item '{prompt.item}' has token id {max(prompt.ids)}, expected ids below "
                f"{model.d_vocab}, the vocabulary of '{model.name}'; use --template raw"
            )


def request_key(
    model: Model, prompts: Sequence[RenderedPrompt], component: str, layers: Sequence[int]
) -> str:
    """The store key: a digest of everything that decides the numbers."""
    return digest_of(
        {
            "format": 1,
            "model": model.fingerprint,
            "tokenizer": model.tokenizer_digest,
            "prompts": [[list(prompt.ids), list(prompt.read)] for prompt in prompts],
            "component": component,
            "layers": list(layers),
            "pooling": "mean over the read positions, float32",
        }
    )


def extract(
    model: Model,
    prompts: Sequence[RenderedPrompt],
    components: Sequence[str],
    layers: Sequence[int],
    store: Store,
    *,
    budget: int = TOKEN_BUDGET,
    label: str = "",
) -> dict[str, Activations]:
    """Pooled activations of every prompt, from the store where they are there.

    Args:
        model: runs the prompts.
        prompts: what to run; each carries its read positions.
        components: TransformerLens names such as `resid_post` or `z`; a layer of −1 exists for the former only.
        layers: 0-based blocks, −1 for the input of block 0.
        store: where finished and unfinished work is kept.
        budget: padded tokens per batch.
        label: shown beside the progress bar.

    Returns:
        One `Activations` per component.

    Raises:
        NonFiniteError: NaN or infinity, naming model, site and item.
        InputError: one prompt alone does not fit into memory.
    """
    wanted = {
        component: tuple(layer for layer in layers if layer >= 0 or component == "resid_post")
        for component in components
    }
    keys = {component: request_key(model, prompts, component, chosen) for component, chosen in wanted.items()}
    stored = {component: store.read(key) for component, key in keys.items()}
    pooled = {component: entry["acts"] for component, entry in stored.items() if entry is not None}
    missing = [component for component in components if component not in pooled]
    logger.info(
        "%s in '%s': %d texts, %s from the store, %s to run",
        label, model.name, len(prompts), ", ".join(pooled) or "nothing", ", ".join(missing) or "nothing",
    )  # fmt: skip
    # One pass over the prompts for all places of one width; heads may be wider or narrower than the stream.
    for width in dict.fromkeys(map(model.width, missing)):
        group = [component for component in missing if model.width(component) == width]
        sites = [Site(layer, component) for component in group for layer in wanted[component]]
        work = digest_of([keys[component] for component in group])
        acts = _compute(model, prompts, sites, store, work, budget, label)
        for component in group:
            rows = [i for i, site in enumerate(sites) if site.component == component]
            pooled[component] = np.ascontiguousarray(acts[:, rows])
            store.write(keys[component], {"acts": pooled[component]})
        store.drop_parts(work)
    return {
        component: Activations(pooled[component], wanted[component], component, model.name, model.centres)
        for component in components
    }


def _compute(
    model: Model,
    prompts: Sequence[RenderedPrompt],
    sites: Sequence[Site],
    store: Store,
    work: str,
    budget: int,
    label: str,
) -> np.ndarray:
    """`[n site width]` in one pass over the prompts; parts of it are kept under the key `work`."""
    width = model.width(sites[0].component)
    plan = plan_extraction(prompts, len(sites), width, budget)
    acts = np.zeros((len(prompts), len(sites), width), np.float32)
    done = np.zeros(len(prompts), bool)
    for part in store.read_parts(work):
        acts[part["rows"]], done[part["rows"]] = part["acts"], True
    pending: list[int] = []
    saved_at, number = time.monotonic(), store.next_part(work)
    with tqdm(total=plan.n_tokens, unit="tok", desc=label, leave=False, disable=None) as bar:
        bar.update(sum(len(prompt.ids) for prompt, ready in zip(prompts, done, strict=True) if ready))
        for batch in plan.batches:
            if done[list(batch)].all():
                continue
            acts[list(batch)] = _run_batch(model, [prompts[i] for i in batch], sites)
            pending += batch
            bar.update(sum(len(prompts[i].ids) for i in batch))
            if time.monotonic() - saved_at > PART_SECONDS:
                store.write_part(work, number, {"rows": np.array(pending), "acts": acts[pending]})
                pending, saved_at, number = [], time.monotonic(), number + 1
    return acts


def _run_batch(model: Model, prompts: Sequence[RenderedPrompt], sites: Sequence[Site]) -> np.ndarray:
    """`[batch layer d_model]`, halving the batch as long as memory runs out."""
    try:
        batch = pad_tokens([prompt.ids for prompt in prompts], model.device)
        with torch.inference_mode():
            pool = Pool.of([prompt.read for prompt in prompts], batch)
            run = model.run(batch, read=sites, last_layer=max(0, *(site.layer for site in sites)), pool=pool)
            pooled = torch.stack([run.acts[site] for site in sites], 1).cpu().numpy()
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        if len(prompts) == 1:
            raise InputError(
                f"item '{prompts[0].item}' alone ({len(prompts[0].ids)} tokens) does not fit into the memory of "
                f"{model.device} beside '{model.name}', expected it to; use a smaller dtype or another device"
            ) from None
        logger.warning("out of memory on %d prompts; going on with half as many", len(prompts))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = len(prompts) // 2
        return np.concatenate(
            [_run_batch(model, prompts[:half], sites), _run_batch(model, prompts[half:], sites)]
        )
    bad = np.argwhere(~np.isfinite(pooled).all(-1))
    if len(bad):
        item, layer = bad[0]
        remedy = "check the checkpoint" if model.dtype == "float32" else "load the model with --dtype float32"
        raise NonFiniteError(
            f"'{model.name}' gave NaN or infinity at {sites[layer]} for item '{prompts[item].item}', expected finite "
            f"activations; {remedy}"
        )
    return pooled


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text


def seconds_per_token(model: Model, prompts: Sequence[RenderedPrompt], sites: Sequence[Site]) -> float:
    """Seconds per padded token, measured on the batch of the plan that stands in its middle."""
    plan = plan_extraction(prompts, len(sites), model.d_model)
    batch = [prompts[i] for i in plan.batches[len(plan.batches) // 2]]
    _run_batch(model, batch[:1], sites)  # the first pass pays for allocation
    started = time.perf_counter()
    _run_batch(model, batch, sites)
    return (time.perf_counter() - started) / (len(batch) * max(len(prompt.ids) for prompt in batch))
