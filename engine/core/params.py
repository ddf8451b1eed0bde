"""Sampling parameters: what a user may ask of the sampler, validated once at the front door.

Owns the rules for legal values. Invariant: a `SamplingParams` that passed `verify` never makes a
worker raise. Names and meanings are those of vLLM and the OpenAI API.
"""

import math
from typing import Final, Literal

import msgspec

from diptych.engine.core.errors import InvalidRequestError

N_MAX: Final = 128
LOGPROBS_MAX: Final = 20
STOP_MAX: Final = 16
STOP_CHARS_MAX: Final = 1024
LOGIT_BIAS_MAX: Final = 1024
BAD_WORDS_MAX: Final = 1024
SEED_MAX: Final = 2**63 - 1


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to turn logits into tokens, and when to stop.

    `max_tokens` None means "up to the model's length". `temperature` 0 is greedy. `top_k` 0 or
    -1 is off. `logprobs` k returns the chosen token's log-probability and the k best; they
    are those of the model's raw distribution (before temperature, penalties and masks).
    `seed` None is replaced by a random seed when the request is accepted, so that an attempt can
    be repeated bit for bit.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    seed: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    truncate_prompt_tokens: int | None = None  # -1: as many as leave room for max_tokens
    truncation_side: Literal["left", "right"] = "left"  # which end of a long prompt goes
    bad_word_ids: list[list[int]] = []
    """`bad_words` as token ids; filled by the front door, which owns the tokenizer."""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def verify(self, vocab_size: int | None = None) -> None:
        """Raises InvalidRequestError naming the parameter, its value and the legal range."""
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _integer("n", self.n, 1, N_MAX)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _integer(name, value, 0, LOGPROBS_MAX)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise _bad("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        if self.seed is not None:
            _integer("seed", self.seed, -SEED_MAX - 1, SEED_MAX)
        if self.truncate_prompt_tokens not in (None, -1):
            _integer("truncate_prompt_tokens", self.truncate_prompt_tokens, 1, 2**31 - 1)
        self._verify_lists(vocab_size)

    def _verify_lists(self, vocab_size: int | None) -> None:
        _count("stop", self.stop, STOP_MAX)
        for text in self.stop:
            if not text or len(text) > STOP_CHARS_MAX:
                raise _bad("stop", text[:40], f"strings of 1 to {STOP_CHARS_MAX} characters")
        _count("bad_words", self.bad_words or [], BAD_WORDS_MAX)
        if any(not word for word in self.bad_words or []):
            raise _bad("bad_words", "", "non-empty strings")
        _count("stop_token_ids", self.stop_token_ids, LOGIT_BIAS_MAX)
        _tokens("stop_token_ids", self.stop_token_ids, vocab_size)
        if self.logit_bias is not None:
            _count("logit_bias", self.logit_bias, LOGIT_BIAS_MAX)
            _tokens("logit_bias", self.logit_bias, vocab_size)
            for bias in self.logit_bias.values():
                _number("logit_bias", bias, -100.0, 100.0)
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                raise _bad("allowed_token_ids", [], "at least one token id")
            _tokens("allowed_token_ids", self.allowed_token_ids, vocab_size)


def _bad(name: str, value: object, legal: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} must be {legal}, got {value!r}.", param=name)


def _number(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    below = value <= low if open_low else value < low
    if not math.isfinite(value) or below or value > high:
        left = "(" if open_low else "["
        raise _bad(name, value, f"a finite number in {left}{low:g}, {high:g}]")


def _integer(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise _bad(name, value, f"an integer between {low} and {high}")


def _count(name: str, values: object, most: int) -> None:
    if len(values) > most:  # type: ignore[arg-type]
        raise _bad(name, f"{len(values)} entries", f"at most {most} entries")  # type: ignore[arg-type]


def _tokens(name: str, ids: object, vocab_size: int | None) -> None:
    for token in ids:  # type: ignore[attr-defined]
        if token < 0 or (vocab_size is not None and token >= vocab_size):
            size = "the vocabulary" if vocab_size is None else f"[0, {vocab_size})"
            raise _bad(name, token, f"token ids in {size}")
