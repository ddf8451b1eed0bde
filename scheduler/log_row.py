"""One request as its API server remembers it: what each choice has emitted, and in which attempt.

Owns the rows of the journal. Invariant: `emitted` only grows, and with prompt, parameters and seed
it is all that is needed to compute the rest of a choice anywhere else.
"""

from dataclasses import dataclass, field

from diptych.engine.core.hashing import extend_chain
from diptych.engine.core.messages import ChoiceState, Tokens
from diptych.engine.core.request import Request
from diptych.engine.core.types import BlockHash, Epoch, pack_ids


@dataclass(slots=True, eq=False)
class ChoiceRow:
    """One answer of a request."""

    index: int
    attempt: int = -1  # -1: never submitted
    emitted: list[int] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)  # of the full blocks known so far
    want_prompt_logprobs: bool = False
    done: bool = False

    def state(self, request: Request, block_size: int) -> ChoiceState:
        """What a scheduler needs to place this choice; the hash chain grows here and only here."""
        emitted = pack_ids(self.emitted)
        hashed = len(self.hashes) * block_size * 4
        new = request.prompt_ids[hashed:] + emitted[max(0, hashed - len(request.prompt_ids)) :]
        parent = self.hashes[-1] if self.hashes else request.root
        self.hashes += extend_chain(parent, new, block_size)
        return ChoiceState(
            self.index, self.attempt, emitted, list(self.hashes), self.want_prompt_logprobs
        )

    def accept(self, item: Tokens) -> Tokens | None:
        """The part of `item` that is new (no gap before it), appended; None if there is none."""
        first = len(self.emitted)
        skip = first - item.first_index
        assert skip >= 0, "a gap is no part of the log"
        ids = item.ids[skip:] if skip else item.ids
        prompt_logprobs = item.prompt_logprobs if self.want_prompt_logprobs else None
        if not ids and item.finish is None and prompt_logprobs is None:
            return None
        self.emitted += ids
        self.done = item.finish is not None
        if prompt_logprobs is not None:
            self.want_prompt_logprobs = False
        if not skip and prompt_logprobs is item.prompt_logprobs:
            return item
        logprobs = None if item.logprobs is None else item.logprobs[skip:]
        return Tokens(item.ref, first, ids, logprobs, item.finish, item.num_cached, prompt_logprobs)


@dataclass(slots=True, eq=False)
class LogRow:
    """One request that has not ended."""

    request: Request
    choices: list[ChoiceRow]
    num_open: int  # choices not done
    opened_at: float
    deadline: float | None
    queued_s: float | None = None  # until a choice of it was placed for the first time
    preemptions: int = 0  # of all choices together
    accepted: bool = False  # from here on the request may only end well, or by its deadline
    epoch: Epoch | None = None  # of the scheduler that it was submitted to last
    retry_at: float | None = None  # an accepted request that was turned away is submitted again


def row_of(request: Request, now: float, deadline: float | None, block_size: int) -> LogRow:
    """A new row. All choices share the hashes of the prompt; choice 0 brings its logprobs."""
    hashes = extend_chain(request.root, request.prompt_ids, block_size)
    params = request.params
    choices = [ChoiceRow(index, hashes=list(hashes)) for index in range(params.n)]
    choices[0].want_prompt_logprobs = params.prompt_logprobs is not None
    return LogRow(request, choices, len(choices), now, deadline)
