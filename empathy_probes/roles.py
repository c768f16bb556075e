"""Which token of one text stands for which of another: positions of two prompts, matched by their role.

Two prompts share their first tokens (`before`) and their last (`after`, without the very last); what stands between is the
`span` in which they differ. `before` is matched from the start, everything else from the end, because the texts
may differ in length: of two unequal spans only the last tokens that both have are matched, and the match says so.
`template` are the tokens outside the content of all messages. In a causal model `before` can carry nothing: it is a check.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from empathy_probes.errors import InputError

ROLES = ("last", "span", "before", "after", "template")
"""Positions by role."""
ALL = "all"
"""Every token that stands for one of the other text."""
EACH = "each"
"""Every token of texts of one length, by its index."""


@dataclass(frozen=True)
class Match:
    """Positions in the source and the positions of the target that they stand for."""

    source: tuple[int, ...]
    target: tuple[int, ...]
    unequal: bool = False
    """One text has tokens of this role that nothing in the other stands for."""


def shared_ends(source: Sequence[int], target: Sequence[int]) -> tuple[int, int]:
    """How many tokens two texts share at their start and, beyond those, at their end.

    >>> shared_ends([1, 2, 3, 9], [1, 4, 5, 3, 9])
    (1, 2)
    >>> shared_ends([7, 7, 9], [7, 9])
    (1, 1)
    """
    shortest = min(len(source), len(target))
    first = next((i for i in range(shortest) if source[i] != target[i]), shortest)
    rest = shortest - first
    return first, next((i for i in range(rest) if source[-1 - i] != target[-1 - i]), rest)


def match_positions(
    role: str,
    source: Sequence[int],
    target: Sequence[int],
    outside: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> Match:
    """The positions of one role in two texts of token ids.

    Args:
        role: one of `ROLES`, `all`, or the index of a token.
        source, target: the texts.
        outside: positions of each text outside the content of its messages, for `template`.

    >>> match_positions("span", [1, 2, 3, 9], [1, 4, 5, 3, 9])
    Match(source=(1,), target=(2,), unequal=True)
    >>> match_positions("after", [1, 2, 3, 9], [1, 4, 5, 3, 9])
    Match(source=(2,), target=(3,), unequal=False)
    """
    n, m = len(source), len(target)
    if role.isdecimal():
        return Match((int(role),), (int(role),))
    first, last = shared_ends(source, target)
    if role == "last":
        return Match((n - 1,), (m - 1,))
    if role == "before":
        return Match(tuple(range(first)), tuple(range(first)))
    if role == "after":
        return Match(tuple(range(n - last, n - 1)), tuple(range(m - last, m - 1)))
    if role == "span":
        return _from_the_end(range(first, n - last), range(first, m - last))
    if role == "template":
        return _from_the_end(*outside)
    if role == ALL:
        span = _from_the_end(range(first, n - last), range(first, m - last))
        start = tuple(range(first))
        return Match(
            (*start, *span.source, *range(n - last, n)),
            (*start, *span.target, *range(m - last, m)),
            span.unequal,
        )
    raise InputError(
        f"unknown position '{role}': expected one of {', '.join((*ROLES, ALL, EACH))}; name one of these"
    )


def _from_the_end(source: Sequence[int], target: Sequence[int]) -> Match:
    both = min(len(source), len(target))
    return Match(
        tuple(source[len(source) - both :]), tuple(target[len(target) - both :]), len(source) != len(target)
    )


def position_names(
    asked: Sequence[str], lengths: Sequence[tuple[int, int]], concept: str, chat: bool
) -> tuple[str, ...]:
    """The positions asked for, `each` spelled out as the indices of all tokens.

    Args:
        asked: names of `ROLES`, `all` or `each`.
        lengths: of both texts of every pair.
        concept: named in messages.
        chat: whether there is a template around the texts.

    Raises:
        InputError: an unknown name, `each` with texts of different lengths, or `template` without one.
    """
    if not asked:
        raise InputError(f"positions got an empty list, expected some of {', '.join(ROLES)}; name one")
    names: list[str] = []
    for name in asked:
        if name == "template" and not chat:
            raise InputError(
                "position 'template' got plain text, expected prompts under a chat template; use template='chat' or leave it out"
            )
        if name == EACH:
            found = {n for pair in lengths for n in pair}
            if len(found) > 1:
                raise InputError(
                    f"position 'each' got texts of {min(found)} to {max(found)} tokens for concept '{concept}', expected all of one "
                    "length, or an index would mean a different word in each; use last, span, before and after"
                )
            names += map(str, range(found.pop()))
        elif name not in (*ROLES, ALL):
            raise InputError(
                f"unknown position '{name}': expected one of {', '.join((*ROLES, ALL, EACH))}; name one of these"
            )
        else:
            names.append(name)
    return tuple(dict.fromkeys(names))
