"""Log-probabilities in the three shapes that clients know.

Owns nothing. JSON has no infinity, so log-probabilities are cut off at -9999, as clients expect.
"""

from collections.abc import Sequence
from typing import Final

from diptych.server.http.replies import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from diptych.server.text.generation import Candidate, PositionLogprobs

_LOWEST: Final = -9999.0


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST


def _name(candidate: Candidate, as_ids: bool) -> str:
    return f"token_id:{candidate.id}" if as_ids else candidate.text


def chat_logprobs(entries: Sequence[PositionLogprobs], top: int, as_ids: bool) -> ChatLogprobs:
    return ChatLogprobs([_token(entry, top, as_ids) for entry in entries])


def _token(entry: PositionLogprobs, top: int, as_ids: bool) -> TokenLogprob:
    chosen = entry.chosen
    return TokenLogprob(
        _name(chosen, as_ids),
        _finite(chosen.logprob),
        list(chosen.bytes),
        [
            TopLogprob(_name(rival, as_ids), _finite(rival.logprob), list(rival.bytes))
            for rival in entry.top[:top]
        ],
    )


def completion_logprobs(
    entries: Sequence[PositionLogprobs], top: int, as_ids: bool, offset: int
) -> CompletionLogprobs:
    """`offset`: characters before the first entry. The chosen token is always among the top."""
    offsets: list[int] = []
    tops: list[dict[str, float] | None] = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry.chosen.text)
        tops.append(_completion_top(entry, top, as_ids))
    return CompletionLogprobs(
        offsets,
        [_finite(entry.chosen.logprob) for entry in entries],
        [_name(entry.chosen, as_ids) for entry in entries],
        tops,
    )


def _completion_top(entry: PositionLogprobs, top: int, as_ids: bool) -> dict[str, float]:
    named: dict[str, float] = {}
    for candidate in (*entry.top[:top], entry.chosen):
        # Two ids may have one name (half characters): the better one keeps it.
        named.setdefault(_name(candidate, as_ids), _finite(candidate.logprob))
    return named


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    return CompletionLogprobs(
        first.text_offset + second.text_offset,
        first.token_logprobs + second.token_logprobs,
        first.tokens + second.tokens,
        first.top_logprobs + second.top_logprobs,
    )


def echo_logprobs(
    first_token: str, entries: Sequence[PositionLogprobs], top: int, as_ids: bool
) -> CompletionLogprobs:
    """Of a whole prompt: nothing is known about its first token."""
    head = CompletionLogprobs([0], [None], [first_token], [None])
    return joined(head, completion_logprobs(entries, top, as_ids, len(first_token)))


def prompt_logprobs(entries: Sequence[PositionLogprobs], top: int) -> PromptLogprobs:
    return [None, *(_prompt_position(entry, top) for entry in entries)]


def _prompt_position(entry: PositionLogprobs, top: int) -> dict[int, PromptLogprob]:
    return {
        candidate.id: PromptLogprob(_finite(candidate.logprob), candidate.rank, candidate.text)
        for candidate in (entry.chosen, *entry.top[:top])
    }
