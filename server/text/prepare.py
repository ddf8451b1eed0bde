"""From what a client asked to what the engine computes: defaults, bad words, lengths.

Owns the rules of length. Invariant: what `prepare` returns fits the model's context, and its
parameters passed `verify`, so the engine never has to refuse them for their form.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from diptych.engine.core.errors import InvalidRequestError
from diptych.engine.core.params import SamplingParams
from diptych.server.client import EngineInfo
from diptych.server.text.tokenizer import Tokenizer

DEFAULTED: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What a model's generation_config.json may set."""


class Prepared(msgspec.Struct, frozen=True):
    prompt_ids: list[int]
    params: SamplingParams


def merge_defaults(
    explicit: Mapping[str, object], sampling_defaults: Mapping[str, object]
) -> SamplingParams:
    """What the client said wins; then the model's defaults; then our own. No verification."""
    defaults = {name: sampling_defaults[name] for name in DEFAULTED if name in sampling_defaults}
    try:
        return msgspec.convert({**defaults, **explicit}, SamplingParams)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"Bad sampling parameters: {error}.") from error


def prepare_params(
    params: SamplingParams,
    prompt_ids: Sequence[int],
    *,
    tokenizer: Tokenizer,
    info: EngineInfo,
    clip_max_tokens: bool = False,
) -> Prepared:
    """Verifies, truncates the prompt, checks lengths, resolves `max_tokens` and `bad_words`.

    `clip_max_tokens`: a `max_tokens` beyond the context is shortened, not refused (for a default
    that the client did not choose). Raises InvalidRequestError.
    """
    params.verify(info.vocab_size)
    if params.stop and not params.detokenize:
        raise InvalidRequestError("stop strings need detokenize=true.", param="stop")
    ids = _truncated(list(prompt_ids), params, info.max_model_len)
    _verify_prompt(ids, info.vocab_size)
    max_tokens = _max_tokens(len(ids), params, info.max_model_len, clip_max_tokens)
    resolved = msgspec.structs.replace(
        params, max_tokens=max_tokens, bad_word_ids=_bad_word_ids(params, tokenizer)
    )
    if resolved.min_tokens > max_tokens:
        raise InvalidRequestError(
            f"min_tokens ({resolved.min_tokens}) is more than the {max_tokens} tokens that fit.",
            param="min_tokens",
        )
    return Prepared(ids, resolved)


def _truncated(ids: list[int], params: SamplingParams, max_model_len: int) -> list[int]:
    most = params.truncate_prompt_tokens
    if most is None:
        return ids
    if most == -1:
        most = max(1, max_model_len - (params.max_tokens or 1))
    return ids[:most] if params.truncation_side == "right" else ids[-most:]


def _verify_prompt(ids: Sequence[int], vocab_size: int) -> None:
    if not ids:
        raise InvalidRequestError(
            "The prompt is empty; it needs at least one token.", param="prompt"
        )
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise InvalidRequestError(
            f"The prompt holds token id {wrong}; ids of this model are 0 to {vocab_size - 1}.",
            param="prompt",
        )


def _max_tokens(num_prompt: int, params: SamplingParams, max_model_len: int, clip: bool) -> int:
    room = max_model_len - num_prompt
    wanted = params.max_tokens
    if room < 1:
        raise InvalidRequestError(
            f"This model's maximum context length is {max_model_len} tokens, and your prompt has "
            f"{num_prompt}, which leaves no room for an answer. Shorten the prompt, or set "
            f"truncate_prompt_tokens.",
            param="prompt",
            code="context_length_exceeded",
        )
    if wanted is None or (clip and wanted > room):
        return room
    if wanted > room:
        raise InvalidRequestError(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested"
            f" {num_prompt + wanted} tokens ({num_prompt} in the prompt, {wanted} for the answer). "
            f"Lower max_tokens to at most {room}, or shorten the prompt.",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return wanted


def _bad_word_ids(params: SamplingParams, tokenizer: Tokenizer) -> list[list[int]]:
    """Each word as it is tokenized at the start of a text and after a space."""
    found: list[list[int]] = []
    for word in params.bad_words or []:
        for text in (word.lstrip(), f" {word.lstrip()}"):
            ids = tokenizer.encode(text, add_special_tokens=False) if word.strip() else []
            if ids and ids not in found:
                found.append(ids)
    return found
