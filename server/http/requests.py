"""The bodies that clients send, decoded and checked for form.

Owns the known fields of the OpenAI dialect and of vLLM's additions. Invariants: a known field of a
wrong type is a 400 that names it; a field that asks for something we cannot do is a 400, never
ignored; any other unknown field is ignored and reported to the caller for counting.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Final, Literal, TypeVar

import msgspec

from diptych.engine.core.errors import InvalidRequestError

T = TypeVar("T", bound=msgspec.Struct)


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What chat and text completions share. None means "not said"."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = None
    seed: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    detokenize: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool | None = None
    priority: int = 0
    cache_salt: str = ""
    timeout_s: float | None = None
    request_id: str | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False


class ContentPart(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    tool_calls: object = None
    function_call: object = None


class ChatRequest(GenerateRequest, frozen=True, kw_only=True):
    messages: list[Message]
    logprobs: bool = False
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    chat_template_kwargs: dict[str, object] = {}
    add_generation_prompt: bool = True
    continue_final_message: bool = False


Prompt = str | list[str | int | list[int]]


class CompletionRequest(GenerateRequest, frozen=True, kw_only=True):
    prompt: Prompt
    logprobs: int | None = None
    echo: bool = False


_IGNORED: Final = frozenset(
    {
        "include_reasoning",
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)
"""Accepted without effect: they do not change what the answer means."""


def _nothing(value: object) -> bool:
    return value is None or value is False or value == [] or value == {} or value == ""


def _text_format(value: object) -> bool:
    return isinstance(value, Mapping) and value.get("type") == "text"


_REFUSED: Final[dict[str, tuple[str, Callable[[object], bool]]]] = {
    "tools": ("tool calls are not supported", _nothing),
    "tool_choice": ("tool calls are not supported", lambda value: value in ("none", "auto")),
    "functions": ("function calls are not supported", _nothing),
    "function_call": ("function calls are not supported", lambda value: value in ("none", "auto")),
    "response_format": ("structured output is not supported; only text is", _text_format),
    "structured_outputs": ("structured output is not supported", _nothing),
    "guided_json": ("structured output is not supported", _nothing),
    "guided_regex": ("structured output is not supported", _nothing),
    "guided_choice": ("structured output is not supported", _nothing),
    "guided_grammar": ("structured output is not supported", _nothing),
    "modalities": ("only text is supported", lambda value: value == ["text"]),
    "audio": ("audio is not supported", _nothing),
    "web_search_options": ("web search is not supported", _nothing),
    "suffix": ("insertion is not supported; send the text before it as prompt", _nothing),
    "best_of": ("best_of is not supported; use n", lambda value: value == 1),
    "use_beam_search": ("beam search is not supported", _nothing),
    "prompt_embeds": ("prompt embeddings are not supported; send text or token ids", _nothing),
    "chat_template": ("templates from clients are not accepted", _nothing),
    "documents": ("documents are not supported; put them in a message", _nothing),
    "logits_processors": ("custom logits processors are not supported", _nothing),
}
"""Field -> (why not, which values are harmless)."""


def decode_object(body: bytes) -> dict[str, object]:
    """Raises InvalidRequestError that says what is wrong with the JSON."""
    try:
        value = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise InvalidRequestError("The request body is not valid UTF-8.") from error
    except RecursionError as error:
        raise InvalidRequestError("The request body is nested too deeply.") from error
    except msgspec.MsgspecError as error:
        reason = "a number is out of range" if "out of range" in str(error) else str(error)
        if _half_characters(body):
            reason = r"a \u escape is half a character (a surrogate without its pair)"
        raise InvalidRequestError(
            f"The request body is not valid JSON: {_sentence(reason)}. (NaN and Infinity are not "
            "JSON numbers.)"
        ) from error
    if not isinstance(value, dict):
        raise InvalidRequestError("The request body must be a JSON object.")
    return {name: item for name, item in value.items() if item is not None}


def _half_characters(body: bytes) -> bool:
    """Whether the standard library reads it, with text in it that no UTF-8 can hold."""
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    except (ValueError, RecursionError):
        pass
    return False


def parse(fields: Mapping[str, object], kind: type[T]) -> tuple[T, list[str]]:
    """The request and the names of the fields that nobody knows. Raises InvalidRequestError."""
    known = set(kind.__struct_fields__)
    for name, (why, harmless) in _REFUSED.items():
        if name in fields and not harmless(fields[name]):
            raise InvalidRequestError(
                f"{name}: {why}. Remove this field.", param=name, code="unsupported_parameter"
            )
    try:
        request = msgspec.convert(_integral(fields), kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _bad_form(str(error)) from error
    except RecursionError as error:
        raise InvalidRequestError("The request body is nested too deeply.") from error
    return request, [name for name in fields.keys() - known - _IGNORED if name not in _REFUSED]


def _integral(fields: Mapping[str, object]) -> dict[str, object]:
    """5.0 is an integer to JSON, and some clients know one kind of number only."""
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in fields.items()
    }


def _bad_form(reason: str) -> InvalidRequestError:
    """msgspec says `Expected X, got Y - at $.field[0]`; OpenAI's `param` is the path."""
    text, _, place = reason.partition(" - at ")
    path = re.search(r"\$([^`]*)", place)
    param = "" if path is None else path[1].lstrip(".").replace("[...]", "")
    missing = re.fullmatch(r"Object missing required field `(\w+)`", text)
    if missing is not None:
        param = f"{param}.{missing[1]}".lstrip(".")
        return InvalidRequestError(f"{param} is required.", param=param)
    return InvalidRequestError(f"{param or 'The body'}: {_sentence(text)}.", param=param or None)


def _sentence(text: str) -> str:
    text = (
        text.replace("`", "").replace("JSON is malformed: ", "").replace(" | null", "").rstrip(".")
    )
    for name, word in (
        ("float", "number"),
        ("int", "integer"),
        ("str", "string"),
        ("bool", "boolean"),
    ):
        text = re.sub(rf"\b{name}\b", word, text)
    return text[:1].lower() + text[1:300]
