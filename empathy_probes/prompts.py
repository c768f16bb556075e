"""Rendering: from a stimulus to token ids and read positions, under a template.

`raw` is the plain text with the special tokens the tokenizer itself adds; `chat` is the tokenizer's own chat
template. A prompt ends where the answer begins: after the template's generation prompt, or, where the assistant spoke last,
behind its last word and before the template closes its turn, so that what is asked continues those words. Message positions
are found by rendering with a placeholder, spans by offset mapping, and both are verified by decoding; no tag is ever typed
by hand. One BOS where the tokenizer begins plain text with one, whether the template writes it or not; none elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from empathy_probes.errors import InputError
from empathy_probes.stimuli import Message, Stimulus, StimulusSet

Style = Literal["raw", "chat"]
_PLACEHOLDER = "\u2063placeholder\u2063"


@dataclass(frozen=True)
class RenderedPrompt:
    """One stimulus as a model sees it."""

    item: str
    """Id of the stimulus."""
    text: str
    ids: tuple[int, ...]
    read: tuple[int, ...]
    """Token positions that are averaged; one for `last` and `message`."""


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer carries a chat template of its own."""
    return bool(getattr(tokenizer, "chat_template", None))


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins plain text with BOS."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]


def style_of(template: str) -> Style:
    """The style of a template that one model has: raw, or chat.

    Raises:
        InputError: another one.
    """
    if template not in ("raw", "chat"):
        raise InputError(f"unknown template '{template}': expected raw or chat; choose one")
    return "raw" if template == "raw" else "chat"


def render(tokenizer: Any, stimuli: StimulusSet, style: Style, speaker: str) -> tuple[RenderedPrompt, ...]:
    """Render every text of a stimulus set.

    The read position `last` is the last token of the rendered prompt: the state from which the model goes on.

    Args:
        tokenizer: a Hugging Face tokenizer.
        stimuli: what to render.
        style: `raw` or `chat`.
        speaker: whose state the texts carry; a plain text is that speaker's turn in a chat template. The assistant's stands
            alone, or behind an empty turn of the user where the template wants the user to begin.

    Raises:
        InputError: a span or message cannot be located in the tokens, or BOS would stand twice.
    """
    bos = _bos_text(tokenizer)
    rendered, ranges = [], []
    for item in stimuli.items:
        text, where = _raw(item, stimuli) if style == "raw" else _chat(tokenizer, item, stimuli, speaker, bos)
        rendered.append(text)
        ranges.append(where)
    needs_offsets = stimuli.read_kind != "last"
    if needs_offsets and not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"concept '{stimuli.concept}' is read at a {stimuli.read_kind}, and this tokenizer "
            f"({type(tokenizer).__name__}) has no offset mapping: expected a fast tokenizer; read at 'last' instead"
        )
    encoded = tokenizer(
        rendered,
        add_special_tokens=style == "raw",
        return_offsets_mapping=needs_offsets,
        return_special_tokens_mask=True,
        verbose=False,
    )
    prompts = []
    for index, item in enumerate(stimuli.items):
        ids = list(encoded["input_ids"][index])
        if style == "raw":  # a sequence-end token that the tokenizer appends is not part of the text
            special = encoded["special_tokens_mask"][index]
            while len(ids) > 1 and special[len(ids) - 1]:
                ids.pop()
        _check_bos(tokenizer, ids, item, stimuli)
        offsets = encoded["offset_mapping"][index][: len(ids)] if needs_offsets else None
        read = _positions(tokenizer, ids, offsets, ranges[index], rendered[index], item, stimuli)
        prompts.append(RenderedPrompt(item.id, rendered[index], tuple(ids), read))
    return tuple(prompts)


def render_texts(tokenizer: Any, texts: Sequence[str]) -> tuple[RenderedPrompt, ...]:
    """Plain texts, each read at its last token, as `raw` renders them."""
    return render_messages(tokenizer, texts, "raw")


def render_messages(tokenizer: Any, texts: Sequence[str], style: Style) -> tuple[RenderedPrompt, ...]:
    """Texts of no concept, as they are or as the user's turn, read at the last token.

    Raises:
        InputError: a chat template is asked of a tokenizer that has none.
    """
    if style == "chat" and not has_chat_template(tokenizer):
        raise InputError(
            "template 'chat' needs a chat template, but this tokenizer has none; use template='raw'"
        )
    items = tuple(Stimulus(f"text-{i}", f"text-{i}", (), text, 0.0) for i, text in enumerate(texts))
    return render(tokenizer, StimulusSet("texts", items, "binary", "last"), style, "user")


def outside_messages(
    tokenizer: Any, stimuli: StimulusSet, prompts: Sequence[RenderedPrompt], speaker: str
) -> tuple[tuple[int, ...], ...]:
    """Positions of each chat prompt outside the content of all its messages: what the template itself put there.

    Raises:
        InputError: the tokenizer has no offset mapping, or a turn cannot be located in the rendered text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"position 'template' of concept '{stimuli.concept}' needs an offset mapping, which this tokenizer "
            f"({type(tokenizer).__name__}) has not: expected a fast tokenizer; leave the position out"
        )
    by_message = replace(stimuli, read_kind="message")
    bos = _bos_text(tokenizer)
    found = []
    for item, prompt in zip(stimuli.items, prompts, strict=True):
        turns = range(max(1, len(item.messages)))
        contents = [
            _chat(tokenizer, replace(item, read=turn), by_message, speaker, bos)[1] or (0, 0)
            for turn in turns
        ]
        offsets = tokenizer(
            prompt.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]
        found.append(
            tuple(
                position
                for position, (a, b) in enumerate(offsets)
                if not any(a < end and b > start and b > a for start, end in contents)
            )
        )
    return tuple(found)


def _bos_text(tokenizer: Any) -> str:
    """BOS as it is written before a rendered chat, where the tokenizer puts one before plain text."""
    return str(tokenizer.bos_token) if begins_with_bos(tokenizer) else ""


def _raw(item: Stimulus, stimuli: StimulusSet) -> tuple[str, tuple[int, int] | None]:
    if stimuli.read_kind == "span":
        start = item.text.index(str(item.read))
        first, last = _trimmed(str(item.read))
        return item.text, (start + first, start + last)
    if stimuli.read_kind == "message" and not item.messages:
        return item.text, (0, len(item.text))
    if stimuli.read_kind == "message":
        chosen = int(item.read or 0)
        start = sum(len(message.content) + 1 for message in item.messages[:chosen])
        return item.text, (start, start + len(item.messages[chosen].content))
    return item.text, None


def _trimmed(span: str) -> tuple[int, int]:
    """Where a span begins and ends without its outer spaces, which belong to the neighbouring tokens."""
    return len(span) - len(span.lstrip()), len(span.rstrip())


def _chat(
    tokenizer: Any, item: Stimulus, stimuli: StimulusSet, speaker: str, bos: str
) -> tuple[str, tuple[int, int] | None]:
    messages = item.messages or _as_turn(tokenizer, item, speaker)
    last = len(messages) - 1
    text = _apply(tokenizer, messages, item, stimuli, bos)
    closed = text
    if messages[last].role == "assistant":
        origin = _locate(tokenizer, messages, last, closed, item, stimuli, bos)
        text = closed[: origin + len(messages[last].content.rstrip())]
    if stimuli.read_kind == "last":
        return text, None
    if stimuli.read_kind == "message":
        chosen = int(item.read or 0) if item.messages else last
        wanted = messages[chosen].content
    else:
        wanted = str(item.read)
        chosen = next((i for i, message in enumerate(messages) if wanted in message.content), -1)
        if chosen < 0:
            raise InputError(
                f"concept '{stimuli.concept}', item '{item.id}': the span {wanted!r} crosses turns, expected it within "
                "one message; choose a span of one turn"
            )
    # The span is unique as it was written, spaces included.
    offset = _locate(tokenizer, messages, chosen, closed, item, stimuli, bos)
    offset += messages[chosen].content.index(wanted)
    first, end = _trimmed(wanted)
    return text, (offset + first, offset + end)


def _as_turn(tokenizer: Any, item: Stimulus, speaker: str) -> tuple[Message, ...]:
    """A plain text as its speaker's turn."""
    if speaker != "assistant":
        return (Message("user", item.text),)
    alone = (Message("assistant", item.text),)
    try:
        _templated(tokenizer, alone)
    except _refusals():
        return (Message("user", ""), *alone)
    return alone


def _locate(
    tokenizer: Any, messages: tuple[Message, ...], chosen: int, text: str, item: Stimulus, stimuli: StimulusSet, bos: str
) -> int:  # fmt: skip
    """Where a turn's content begins in the rendered text, its own leading spaces counted even where they are stripped."""
    # The turn's place is where a placeholder lands, so a tag or an earlier turn with the same words cannot be hit.
    marked = [Message(m.role, _PLACEHOLDER) if i == chosen else m for i, m in enumerate(messages)]
    start = _apply(tokenizer, tuple(marked), item, stimuli, bos).find(_PLACEHOLDER)
    whole = messages[chosen].content
    if start >= 0 and text.startswith(whole, start):
        return start
    if start >= 0 and text.startswith(whole.strip(), start):  # many templates strip a turn's outer spaces
        return start - (len(whole) - len(whole.lstrip()))
    raise InputError(
        f"concept '{stimuli.concept}', item '{item.id}': turn {chosen} cannot be located in the rendered chat "
        "template, expected its content unchanged; use --template raw for this tokenizer"
    )


def _apply(
    tokenizer: Any, messages: tuple[Message, ...], item: Stimulus, stimuli: StimulusSet, bos: str
) -> str:
    try:
        text = _templated(tokenizer, messages)
    except _refusals() as error:
        raise InputError(
            f"concept '{stimuli.concept}', item '{item.id}': the chat template refuses the turns "
            f"{', '.join(m.role for m in messages)} ({error}), expected turns it accepts; use --template raw or other turns"
        ) from None
    # Templates of models that saw BOS at the start of every text may leave it to the tokenizer.
    return text if text.lstrip().startswith(bos) else bos + text


def _templated(tokenizer: Any, messages: tuple[Message, ...]) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    ask = messages[-1].role != "assistant"
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask))


def _refusals() -> tuple[type[Exception], ...]:
    """What a chat template raises on turns it does not take."""
    from jinja2 import TemplateError

    return (TemplateError, ValueError)


def _check_bos(tokenizer: Any, ids: list[int], item: Stimulus, stimuli: StimulusSet) -> None:
    bos = getattr(tokenizer, "bos_token_id", None)
    if not ids:
        raise InputError(
            f"concept '{stimuli.concept}', item '{item.id}' has no tokens: expected at least one; write a longer text"
        )
    if bos is not None and ids[:2] == [bos, bos]:
        raise InputError(
            f"concept '{stimuli.concept}', item '{item.id}': BOS stands twice at the start, expected once; remove the "
            f"literal {tokenizer.bos_token!r} from the text or from the chat template"
        )


def _positions(
    tokenizer: Any,
    ids: list[int],
    offsets: Sequence[tuple[int, int]] | None,
    where: tuple[int, int] | None,
    text: str,
    item: Stimulus,
    stimuli: StimulusSet,
) -> tuple[int, ...]:
    if where is None or offsets is None:
        return (len(ids) - 1,)
    start, end = where
    covered = tuple(i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a)
    decoded = tokenizer.decode([ids[i] for i in covered]) if covered else ""
    # Tokens may carry a space or a piece of a neighbouring word: the span has to be inside, spaces aside. A text that is read
    # as a whole has no neighbours, and a tokenizer may write some of its words otherwise.
    whole = item.read == item.text or (not item.messages and stimuli.read_kind == "message")
    if not covered or (not whole and "".join(text[start:end].split()) not in "".join(decoded.split())):
        raise InputError(
            f"concept '{stimuli.concept}', item '{item.id}': the tokens of {text[start:end]!r} decode to {decoded!r}, "
            "expected the span itself; choose another span or read at 'last'"
        )
    if stimuli.read_kind == "message":
        return covered[-1:]
    # The first token of a text is an attention sink in many models, as BOS is: tens of times as long as any other, it would
    # be all that a mean over the span shows.
    return covered[1:] if covered[0] == 0 and len(covered) > 1 else covered
