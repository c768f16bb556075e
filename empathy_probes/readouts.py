"""One number per text, in nats, from one run: how far the model's answer leans to the expressive side.

`answers`: log-sum-exp of the logits of one set of next tokens minus that of another, after the rendered prompt. `continuations`:
difference of two continuations' mean log-probability per token. Answers are tokenised as prompt + answer and prefix-differenced,
so that a token never depends on what we believe a tokenizer does. Only the positions and rows of the unembedding that a
readout needs are computed; a readout is taken from the state after the last block, whichever model that state came from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from empathy_probes.batches import TokenBatch, pack_tokens, pad_tokens
from empathy_probes.coding import scenario_contrasts
from empathy_probes.concepts import Concept
from empathy_probes.design import Design
from empathy_probes.errors import InputError
from empathy_probes.models import Model
from empathy_probes.prompts import RenderedPrompt, Style
from empathy_probes.sites import Site
from empathy_probes.stimuli import ReadoutSpec, StimulusSet
from empathy_probes.store import digest_of

TOKEN_BUDGET = 4096


@dataclass(frozen=True)
class Asked:
    """The prompts of one concept with what is asked after each, as token ids."""

    concept: str
    kind: str
    """answers or continuations."""
    items: tuple[str, ...]
    """Ids of the stimuli."""
    prompts: tuple[tuple[int, ...], ...]
    """The rendered prompt of each item."""
    read: tuple[tuple[int, ...], ...]
    """Read positions within each prompt."""
    expressive: tuple[tuple[int, ...], ...]
    """Per item the ids of the expressive answers, or those of the expressive continuation."""
    attenuated: tuple[tuple[int, ...], ...]

    @cached_property
    def digest(self) -> str:
        """Of everything that decides a readout but the model."""
        return digest_of([self.kind, self.prompts, self.expressive, self.attenuated])

    def length(self, item: int) -> int:
        """Tokens that are run for an item."""
        return len(self.prompts[item]) + sum(map(len, self.tails(item)))

    def tails(self, item: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What is run after the prompt of an item: of each continuation all but its last token."""
        if self.kind == "answers":
            return (), ()
        return self.expressive[item][:-1], self.attenuated[item][:-1]


def ask(tokenizer: Any, stimuli: StimulusSet, prompts: Sequence[RenderedPrompt], style: Style) -> Asked:
    """Tokenise what every text's readout asks, at the end of its prompt.

    Under a chat template that is after the generation prompt; where the assistant spoke last, it is behind its last word and
    before the template's end of turn, so that a continuation goes on with those words (`prompts.render`).

    Raises:
        InputError: a text has no readout, an answer is not one token, two answers are the same token, or the prompt's
            own tokens change when the answer follows; the message shows the split.
    """
    sides: tuple[list[tuple[int, ...]], list[tuple[int, ...]]] = ([], [])
    kinds = {item.readout.kind if item.readout else None for item in stimuli.items}
    if len(kinds) > 1 or None in kinds:
        raise InputError(
            f"concept '{stimuli.concept}' has readouts of the kinds {', '.join(sorted(str(k) for k in kinds))}, expected one kind "
            "for all texts; give every line a readout, or a readout file"
        )
    kind = str(kinds.pop())
    specs = [item.readout for item in stimuli.items if item.readout is not None]
    follow = _following(
        tokenizer, [(prompt, answer) for prompt, spec in zip(prompts, specs, strict=True)
                    for answer in (*spec.expressive, *spec.attenuated)], style, stimuli.concept
    )  # fmt: skip
    for spec in specs:
        for side, answers in zip(sides, (spec.expressive, spec.attenuated), strict=True):
            ids = [next(follow) for _ in answers]
            if kind == "answers":
                for answer, found in zip(answers, ids, strict=True):
                    if len(found) != 1:
                        split = ", ".join(repr(tokenizer.decode([i])) for i in found)
                        raise InputError(
                            f"concept '{stimuli.concept}', readout answer {answer!r} is {len(found)} tokens ({split}), expected "
                            "one; choose a shorter word, or use continuations"
                        )
                side.append(tuple(found[0] for found in ids))
            else:
                side.append(ids[0])
        if kind == "answers" and set(sides[0][-1]) & set(sides[1][-1]):
            shared = tokenizer.decode(sorted(set(sides[0][-1]) & set(sides[1][-1]))[:1])
            raise InputError(
                f"concept '{stimuli.concept}': both sets of answers contain the token {shared!r}, expected disjoint sets; drop it "
                "from one"
            )
    return Asked(
        stimuli.concept, kind, tuple(item.id for item in stimuli.items), tuple(p.ids for p in prompts),
        tuple(p.read for p in prompts), tuple(sides[0]), tuple(sides[1]),
    )  # fmt: skip


def check_length(model: Model, asked: Asked) -> None:
    """Refuse what is longer than a model's context, before anything runs.

    Raises:
        InputError: a prompt and its continuation have too many tokens together.
    """
    for i, item in enumerate(asked.items):
        longest = len(asked.prompts[i]) + max(len(tail) for tail in asked.tails(i))
        if longest > model.n_ctx:
            raise InputError(
                f"concept '{asked.concept}', item '{item}' has {longest} tokens with what is asked after it, expected at most "
                f"{model.n_ctx}, the context of '{model.name}'; shorten the text or the continuation"
            )


def _following(
    tokenizer: Any, answers: Sequence[tuple[RenderedPrompt, str]], style: Style, concept: str
) -> Iterator[tuple[int, ...]]:
    """Tokens of every answer behind its prompt."""
    # All texts in one call: one by one they take twice as long.
    encoded = tokenizer(
        [prompt.text + answer for prompt, answer in answers],
        add_special_tokens=style == "raw", return_special_tokens_mask=True, verbose=False,
    )  # fmt: skip
    for (prompt, answer), ids, special in zip(
        answers, encoded["input_ids"], encoded["special_tokens_mask"], strict=True
    ):
        while style == "raw" and len(ids) > 1 and special[len(ids) - 1]:
            ids.pop()
        n = len(prompt.ids)
        if tuple(ids[:n]) != prompt.ids or len(ids) == n:
            seen = tokenizer.convert_ids_to_tokens(ids[max(0, n - 2) :])
            raise InputError(
                f"concept '{concept}', item '{prompt.item}': with the answer {answer!r} the prompt's end is tokenised as {seen}, "
                f"expected the prompt's own tokens and then the answer; begin the answer with a space, or end the text differently"
            )
        yield tuple(ids[n:])


def with_readout(stimuli: StimulusSet, spec: ReadoutSpec | None) -> StimulusSet:
    """The same texts, every one with this readout, or none with any."""
    return replace(stimuli, items=tuple(replace(item, readout=spec) for item in stimuli.items))


def has_readout(stimuli: StimulusSet) -> bool:
    """Whether every text says what is asked after it."""
    return all(item.readout is not None for item in stimuli.items)


@dataclass(frozen=True)
class AskedBatch:
    """Some items of an `Asked`, padded, with the places where the answer is looked up."""

    index: tuple[int, ...]
    """Items."""
    copies: int
    """Rows of `tokens` per item: 1, or 2 where each continuation needs a row of its own."""
    tokens: TokenBatch
    rows: Int[Tensor, " place"]
    """Row of each place that is looked up."""
    positions: Int[Tensor, " place"]
    targets: Int[Tensor, "place target"]
    """Token ids looked up there, padded with 0."""
    weight: Float[Tensor, "place target"]
    """1 or −1 of an answer by its side (0: padding); of a continuation's token 1 over its length, signed."""
    owner: Int[Tensor, " place"]
    """Place in `index` of the item each place belongs to."""
    normalised: bool
    """Log-probabilities over the whole vocabulary are needed."""


def batch_asked(asked: Asked, index: Sequence[int], *models: Model) -> AskedBatch:
    """Pad some items into one batch for these models.

    Two continuations share a row, and with it the computation of their prompt, where every model can (`Model.pack_refusal`).
    """
    device = models[0].device
    two_rows = asked.kind != "answers" and any(model.pack_refusal for model in models)
    if asked.kind == "answers":
        tokens = pad_tokens([asked.prompts[i] for i in index], device)
    elif two_rows:
        tokens = pad_tokens([(*asked.prompts[i], *tail) for i in index for tail in asked.tails(i)], device)
    else:
        tokens = pack_tokens([(asked.prompts[i], *asked.tails(i)) for i in index], device)
    places: list[tuple[int, int, list[int], list[float], int]] = []
    for k, i in enumerate(index):
        end = len(asked.prompts[i]) - 1
        if asked.kind == "answers":
            targets = [*asked.expressive[i], *asked.attenuated[i]]
            places.append(
                (k, end, targets, [1.0] * len(asked.expressive[i]) + [-1.0] * len(asked.attenuated[i]), k)
            )
        else:
            for copy, (side, sign) in enumerate(((asked.expressive[i], 1.0), (asked.attenuated[i], -1.0))):
                row = 2 * k + copy if two_rows else k
                # In a shared row the second continuation stands behind the first.
                shift = 0 if two_rows or copy == 0 else len(asked.expressive[i]) - 1
                places += [
                    (row, end + j + (shift if j else 0), [t], [sign / len(side)], k)
                    for j, t in enumerate(side)
                ]
    width = max(len(place[2]) for place in places)
    pad = [(r, p, t + [0] * (width - len(t)), w + [0.0] * (width - len(w)), o) for r, p, t, w, o in places]
    rows, positions, targets_, weights, owner = (list(column) for column in zip(*pad, strict=True))

    def tensor(values: Any) -> Tensor:
        return torch.tensor(values, device=device)

    return AskedBatch(
        index=tuple(index), copies=2 if two_rows else 1, tokens=tokens, rows=tensor(rows),
        positions=tensor(positions), targets=tensor(targets_), weight=tensor(weights), owner=tensor(owner),
        normalised=asked.kind != "answers",
    )  # fmt: skip


def look_up(
    model: Model, batch: AskedBatch, final: Float[Tensor, "row pos d_model"]
) -> Float[Tensor, " item"]:
    """The readout of every item from the state after the last block, by this model's norm and head.

    `final` may hold the batch several times over (positions edited at once): then every copy gets its readouts.
    """
    times = final.shape[0] // len(batch.tokens.ids)
    n_rows, n_items = len(batch.tokens.ids), len(batch.index)
    rows = torch.cat([batch.rows + k * n_rows for k in range(times)])
    owner = torch.cat([batch.owner + k * n_items for k in range(times)])
    targets, weight = batch.targets.repeat(times, 1), batch.weight.repeat(times, 1)
    positions = batch.positions.repeat(times)
    values = torch.zeros(times * n_items, dtype=torch.float64, device=final.device)
    if batch.normalised:
        # Both continuations begin after the same state, whose row of the vocabulary is computed once.
        place, which = torch.unique(rows * final.shape[1] + positions, return_inverse=True)
        spoken = model.head(final.flatten(0, 1)[place]).float().log_softmax(-1)
        found = spoken[which[:, None], targets].double()
        return values.index_add_(0, owner, (found * weight).sum(-1))
    logits = model.head_rows(final[rows, positions], targets).double()
    sides = [logits.masked_fill(weight * sign <= 0, -torch.inf).logsumexp(-1) for sign in (1, -1)]
    return values.index_add_(0, owner, sides[0] - sides[1])


def asked_batches(asked: Asked, budget: int = TOKEN_BUDGET) -> list[tuple[int, ...]]:
    """Items in batches of at most `budget` padded tokens, longest first."""
    return token_batches([range(asked.length(i)) for i in range(len(asked.items))], budget)


def read_out(
    model: Model, asked: Asked, write: Callable[[AskedBatch], Mapping[Site, Any]] | None = None
) -> Float[np.ndarray, " item"]:
    """The readout of every item in one model, in nats.

    Args:
        model: answers.
        asked: from `ask`, with this model's prompts.
        write: gives the edits of a batch; none by default.
    """
    values = np.zeros(len(asked.items))
    last = Site(model.n_layers - 1)
    for index in asked_batches(asked):
        batch = batch_asked(asked, index, model)
        with torch.inference_mode():
            edits = write(batch) if write else None
            run = model.run(batch.tokens, read=[last], write=edits, last_layer=last.layer)
            values[list(index)] = look_up(model, batch, run.acts[last]).cpu().numpy()
    return values


def scenario_coupling(
    values: Float[np.ndarray, "item *batch"], stimuli: StimulusSet
) -> Float[np.ndarray, "unit *batch"]:
    """c_s: readout of the texts with label 1 minus that of label 0 (per grade), averaged within a scenario."""
    if stimuli.kind == "categorical":
        raise InputError(
            f"concept '{stimuli.concept}' has categories, expected two labels or grades for a coupling; ask for one of its "
            "contrasts instead"
        )
    flat = values.reshape(len(values), 1, -1)
    return scenario_contrasts(flat, stimuli)[0, :, 0].reshape(-1, *values.shape[1:])


def token_batches(rows: Sequence[Sequence[int]], budget: int = TOKEN_BUDGET) -> list[tuple[int, ...]]:
    """Indices of rows in batches of at most `budget` padded tokens, longest first."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    batches: list[list[int]] = []
    for i in order:
        if batches and len(rows[batches[-1][0]]) * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return [tuple(batch) for batch in batches]


def token_losses(
    model: Model, batch: TokenBatch, final: Float[Tensor, "row pos d_model"]
) -> Float[np.ndarray, " row"]:
    """Mean next-token loss of each row in nats, from the state after the last block by this model's norm and head."""
    logits = model.head(final[:, :-1].flatten(0, 1)).float()
    loss = torch.nn.functional.cross_entropy(logits, batch.ids[:, 1:].flatten(), reduction="none")
    loss = loss.view(len(batch.ids), -1) * batch.mask[:, 1:]
    return (loss.sum(1) / batch.mask[:, 1:].sum(1)).double().cpu().numpy()


def neutral_losses(model: Model, rows: Sequence[Sequence[int]]) -> Float[np.ndarray, " text"]:
    """Mean next-token loss of each text in nats; their mean's exponential is the perplexity."""
    losses = np.zeros(len(rows))
    last = Site(model.n_layers - 1)
    for index in token_batches(rows):
        batch = pad_tokens([rows[i] for i in index], model.device)
        with torch.inference_mode():
            state = model.run(batch, read=[last], last_layer=last.layer).acts[last]
            losses[list(index)] = token_losses(model, batch, state)
    return losses


def readable(design: Design) -> tuple[Concept, ...]:
    """The concepts that can be asked for: those with a readout and two labels or grades.

    Raises:
        InputError: there is none.
    """
    found = tuple(c for c in design.concepts if has_readout(c.stimuli) and c.stimuli.kind != "categorical")
    if not any(c.role == "target" for c in found):
        raise InputError(
            f"no readout: none of the targets {', '.join(c.name for c in design.concepts if c.role == 'target')} says what is asked "
            "after its texts, expected a readout in the stimuli or a readout file; give one with --readout, or run the encode "
            "stage only"
        )
    return found


def ask_design(design: Design, concept: Concept, template: str, side: int) -> Asked:
    """A concept's prompts with what is asked after them, as one of the models (0 base, 1 aligned) sees them."""
    style: Style = "raw" if template == "raw" else "chat"
    # `shared` prompts are the aligned model's, for both.
    tokenizer = design.pair.models[1 if template == "shared" else side].tokenizer
    asked = ask(tokenizer, concept.stimuli, design.prompts[concept.name, template][side], style)
    # The template `own` is the only one under which a model does not see the other's prompts.
    for model in design.pair.models if template != "own" else (design.pair.models[side],):
        check_length(model, asked)
    return asked
