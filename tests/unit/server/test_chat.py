"""The terminal conversation, with scripted answers and a scripted keyboard."""

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from diptych.engine.core.errors import DiptychError
from diptych.server import chat
from diptych.server.chat import ChatMessage


class Script:
    """Answers "<n>: <last message>" in pieces; remembers every conversation it was shown."""

    def __init__(self) -> None:
        self.seen: list[list[ChatMessage]] = []

    def __call__(self, messages: list[ChatMessage]) -> Iterator[str]:
        self.seen.append([dict(message) for message in messages])
        last = messages[-1]["content"]
        if last == "break":
            yield "half"
            raise DiptychError("the server went away")
        if last == "stop":
            yield "begin"
            raise KeyboardInterrupt
        yield f"{len(self.seen)}: "
        yield last


def run(
    monkeypatch: pytest.MonkeyPatch, lines: list[str], system: str | None
) -> tuple[str, Script]:
    typed = iter(lines)

    def keyboard(prompt: str = "") -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", keyboard)
    sink, script = io.StringIO(), Script()
    chat.converse(script, system, Console(file=sink, width=80))
    return sink.getvalue(), script


def test_answers_stream_and_the_conversation_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, script = run(monkeypatch, ["hi", "", "again"], "be brief")
    assert shown == "1: hi\n2: again\n"
    assert script.seen[1] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "1: hi"},
        {"role": "user", "content": "again"},
    ]


def test_reset_and_system_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    _, script = run(monkeypatch, ["a", "/reset", "b", "/system pirate", "c"], None)
    assert script.seen[1] == [{"role": "user", "content": "b"}]
    assert script.seen[2][0] == {"role": "system", "content": "pirate"}


def test_an_error_and_an_interrupt_end_the_answer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, script = run(monkeypatch, ["break", "stop", "on"], None)
    assert "half" in shown
    assert "error: the server went away" in shown
    assert "begin [stopped]" in shown
    assert shown.endswith("3: on\n")
    assert script.seen[2][-2] == {"role": "assistant", "content": "begin"}
