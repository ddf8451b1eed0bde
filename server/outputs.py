"""What the Python API returns: finished answers, and the pieces of a stream.

Plain data for users of `Engine`; nothing here travels between processes.
"""

from dataclasses import dataclass, field

from diptych.server.text.generation import PositionLogprobs


@dataclass(slots=True)
class CompletionOutput:
    """One answer (choice) of a request."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error"
    stop_reason: int | str | None = None  # the stop token id or stop string that matched
    logprobs: list[PositionLogprobs] | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum of the chosen tokens' log-probabilities, None without `logprobs`."""
        return (
            None if self.logprobs is None else sum(entry.chosen.logprob for entry in self.logprobs)
        )


@dataclass(slots=True)
class RequestOutput:
    """A finished request: its prompt and its `n` answers in order."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[PositionLogprobs] | None = None
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.outputs[0].text
