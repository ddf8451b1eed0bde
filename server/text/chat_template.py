"""Chat messages to prompt text through the model's own Jinja template, in a sandbox.

Owns the compiled templates of one model. The template comes from the operator's model folder, the
messages from the client; whatever either can cause is an InvalidRequestError. Invariant: rendering
sees only data (no attribute access to Python internals) and its output has a limit.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Final

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from diptych.engine.core.errors import InvalidRequestError

OUTPUT_CHARS_MAX: Final = 32 * 1024 * 1024
_CONTINUE_MARK: Final = "\x00diptych-continue\x00 "  # the space shows whether the template trims
_RESERVED: Final = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it only renders."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> str:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which models have not been trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """`tokens`: names such as bos_token that templates refer to."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        """Raises jinja2.TemplateSyntaxError."""
        self._template = _environment().from_string(source)
        self._tokens = dict(tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        arguments: Mapping[str, object] | None = None,
        now: Callable[[str], str] | None = None,
    ) -> str:
        """`arguments`: further template variables of the client; `now` replaces the clock."""
        if continue_final_message:
            messages = _marked(messages)
        context: dict[str, object] = {**self._tokens, **(arguments or {})}
        if _RESERVED & (arguments or {}).keys():
            name = sorted(_RESERVED & (arguments or {}).keys())[0]
            raise _bad(f"{name} cannot be set here", "chat_template_kwargs")
        if now is not None:
            context["strftime_now"] = now
        text = self._run(
            {
                **context,
                "messages": [dict(message) for message in messages],
                "tools": None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            }
        )
        return _cut_at_mark(text) if continue_final_message else text

    def _run(self, context: dict[str, object]) -> str:
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(context):
                size += len(part)
                if size > OUTPUT_CHARS_MAX:
                    raise _bad("the rendered prompt is too long", "messages")
                parts.append(part)
        except (jinja2.TemplateError, jinja2.exceptions.SecurityError) as error:
            raise _bad(str(error) or "the template refused the messages", "messages") from error
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise _bad("the messages do not have the form it expects", "messages") from error
        except (RecursionError, MemoryError) as error:
            raise _bad("rendering needs too much memory", "messages") from error
        return "".join(parts)


def _bad(reason: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(f"The model's chat template failed: {reason[:500]}.", param=param)


def _marked(messages: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """Appends a mark to the last content; the prompt ends where the template puts the mark."""
    if not messages or not isinstance(messages[-1].get("content"), str):
        raise InvalidRequestError(
            "continue_final_message needs a last message with text content.", param="messages"
        )
    last = dict(messages[-1])
    last["content"] = f"{last['content']}{_CONTINUE_MARK}"
    return [*messages[:-1], last]


def _cut_at_mark(text: str) -> str:
    at = text.rfind(_CONTINUE_MARK.rstrip())
    if at < 0:
        raise _bad("it does not show the last message, so it cannot be continued", "messages")
    trims = not text.startswith(_CONTINUE_MARK, at)
    return text[:at].rstrip() if trims else text[:at]
