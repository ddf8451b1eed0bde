"""A fake model with real KV semantics, and the oracle that needs no KV at all.

A step writes one cell for each position it computes, chained over the tokens before it, and reads
every cell [0, position] through the block table; the sampled token is a pure function of the cells
read and of (seed, choice, position). A stale, foreign or unwritten cell therefore changes the
token. The oracle computes the same tokens from the prompt alone.
"""

from dataclasses import dataclass, field
from typing import Final

from diptych.engine.core.hashing import extend_chain
from diptych.engine.core.plan import FinishInfo, TokenLogprobs
from diptych.engine.core.types import BlockHash, FinishReason, pack_ids

EOS: Final = 1
STOP: Final = 2
FIRST_TOKEN: Final = 10
VOCAB: Final = 1 << 30
_START: Final = 77


def next_cell(previous: int, token: int, position: int) -> int:
    return hash((previous, token, position))


def chain(tokens: list[int]) -> list[int]:
    """The cells of all positions of `tokens`."""
    cells: list[int] = []
    cell = _START
    for position, token in enumerate(tokens):
        cell = hash((cell, token, position))
        cells.append(cell)
    return cells


def first_cell() -> int:
    return _START


def logits_of(cells: list[int]) -> int:
    """What attention over the cells [0, position] says; depends on every one of them."""
    return hash(tuple(cells))


def sample(
    logits: int,
    seed: int,
    choice: int,
    position: int,
    num_emitted: int,
    may_stop: bool,
    stop_ids: list[int],
) -> int:
    """The token after `position`, the `num_emitted`-th of its choice."""
    draw = hash((logits, seed, choice, position, num_emitted)) & 0x7FFFFFFFFFFFFFFF
    if may_stop:
        kind = draw % 96
        if kind == 0:
            return EOS
        if kind == 1 and stop_ids:
            return STOP
    return FIRST_TOKEN + (draw >> 8) % (VOCAB - FIRST_TOKEN)


def logprob_of(logits: int, token: int) -> TokenLogprobs:
    return TokenLogprobs(token, -float(hash((logits, token)) % 1000) / 100.0, 1, [])


@dataclass(slots=True, frozen=True)
class RequestSpec:
    """One request of a scenario: what is asked, and how its client behaves."""

    index: int
    api: int
    at: float
    prompt: list[int]
    seed: int
    max_tokens: int
    n: int = 1
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_ids: list[int] = field(default_factory=list)
    logprobs: bool = False
    prompt_logprobs: bool = False
    priority: int = 0
    salt: int = 0
    timeout_s: float | None = None
    close_after_tokens: int | None = None  # the client disconnects when it has seen this many
    close_after_s: float | None = None
    stops: dict[int, int] = field(default_factory=dict)  # choice -> length where a stop matched
    poison_at: int | None = None  # computing this position crashes the worker
    nan_at: int | None = None  # emitted index whose sampling fails


@dataclass(slots=True, frozen=True)
class Answer:
    """What the oracle expects of one choice."""

    tokens: list[int]
    finish: FinishInfo
    cells: list[int]  # of prompt and tokens
    prompt_logprobs: list[TokenLogprobs]
    logprobs: list[TokenLogprobs]


class Oracle:
    """Tokens, cells and block contents of every request, computed without any pool."""

    def __init__(self, block_size: int, max_model_len: int) -> None:
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.blocks: dict[BlockHash, list[int]] = {}  # hash -> cells of the block
        self._answers: dict[tuple[int, int], Answer] = {}

    def answer(self, spec: RequestSpec, choice: int) -> Answer:
        key = (spec.index, choice)
        if key not in self._answers:
            self._answers[key] = self._compute(spec, choice)
        return self._answers[key]

    def register(self, root: BlockHash, answer: Answer, tokens: list[int]) -> None:
        """Remembers what the full blocks of `tokens` must hold, by hash."""
        size = self.block_size
        for i, block_hash in enumerate(extend_chain(root, pack_ids(tokens), size)):
            self.blocks[block_hash] = answer.cells[i * size : (i + 1) * size]

    def _compute(self, spec: RequestSpec, choice: int) -> Answer:
        cells = chain(spec.prompt)
        prompt_logprobs = [
            logprob_of(logits_of(cells[: i + 1]), spec.prompt[i + 1])
            for i in range(len(spec.prompt) - 1)
            if spec.prompt_logprobs
        ]
        tokens: list[int] = []
        logprobs: list[TokenLogprobs] = []
        finish: FinishInfo | None = None
        while finish is None:
            if spec.nan_at == len(tokens):
                finish = FinishInfo(FinishReason.ERROR)
                break
            logits = logits_of(cells)
            position = len(cells) - 1
            may_stop = len(tokens) >= spec.min_tokens
            token = sample(
                logits, spec.seed, choice, position, len(tokens), may_stop, spec.stop_ids
            )
            tokens.append(token)
            logprobs.append(logprob_of(logits, token))
            cells.append(next_cell(cells[-1], token, len(cells)))
            if token == EOS and not spec.ignore_eos:
                finish = FinishInfo(FinishReason.STOP)
            elif token == STOP and STOP in spec.stop_ids:
                finish = FinishInfo(FinishReason.STOP, STOP)
            elif len(tokens) >= spec.max_tokens or len(cells) >= self.max_model_len:
                finish = FinishInfo(FinishReason.LENGTH)
        return Answer(tokens, finish, cells, prompt_logprobs, logprobs)
