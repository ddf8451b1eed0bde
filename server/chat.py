"""`diptych chat`: talk to a server, or to a model in this process, in the terminal.

Owns the conversation. Answers stream as they come; Ctrl-C stops an answer, Ctrl-D ends the chat.
"""

import argparse
import contextlib
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

from rich.console import Console

from diptych.engine.core.errors import ConfigError, DiptychError
from diptych.engine.core.params import SamplingParams

ChatMessage = dict[str, str]
Reply = Callable[[list[ChatMessage]], Iterator[str]]

_HELP = """\
Type a message and press Enter. Ctrl-C stops an answer, Ctrl-D leaves.
  /reset         forget the conversation
  /system TEXT   begin anew with a system message
  /help          this text"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", help="model folder or name to run here (default: talk to --url)")
    add("--url", default="http://127.0.0.1:8000", help="server to talk to (default: %(default)s)")
    add("--served-model-name", help="model name to ask the server for (default: its first)")
    add("--api-key", help="key for the server")
    add("--system", help="system message")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    add("--max-tokens", type=int, default=256, help="longest answer (default: %(default)s)")


def server_reply(args: argparse.Namespace) -> Reply:
    """Answers from an OpenAI-compatible server."""
    headers = {"Content-Type": "application/json"}
    if args.api_key:
        headers["Authorization"] = f"Bearer {args.api_key}"
    url = args.url.rstrip("/")

    def post(path: str, body: dict[str, object] | None) -> "urllib.request.Request":
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.Request(f"{url}{path}", data=data, headers=headers)

    model = args.served_model_name
    if model is None:
        try:
            with urllib.request.urlopen(post("/v1/models", None), timeout=10) as response:
                model = json.load(response)["data"][0]["id"]
        except OSError as error:
            raise ConfigError(
                f"no server answers at {url} ({error}); start one with `diptych serve`, "
                "or name a model: `diptych chat MODEL`"
            ) from error

    def reply(messages: list[ChatMessage]) -> Iterator[str]:
        body = {
            "model": model,
            "messages": messages,
            "stream": True,
            "temperature": args.temperature,
            "max_tokens": args.max_tokens,
        }
        try:
            with urllib.request.urlopen(post("/v1/chat/completions", body)) as response:
                for line in response:
                    if line.startswith(b"data: {"):
                        yield from _content(json.loads(line[6:]))
        except urllib.error.HTTPError as error:
            raise DiptychError(json.load(error)["error"]["message"]) from error
        except OSError as error:
            raise DiptychError(f"the server at {url} went away: {error}") from error

    return reply


def _content(chunk: dict[str, list[dict[str, dict[str, str]]]]) -> Iterator[str]:
    if "error" in chunk:
        raise DiptychError(str(chunk["error"]))
    for choice in chunk["choices"]:
        if text := choice["delta"].get("content"):
            yield text


@contextlib.contextmanager
def local_reply(args: argparse.Namespace) -> Iterator[Reply]:
    """Answers from a model loaded in this process."""
    from diptych.server.engine import Engine

    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
    with Engine(None if args.model == "builtin" else args.model, inline=True) as engine:

        def reply(messages: list[ChatMessage]) -> Iterator[str]:
            for delta in engine.stream_chat(messages, params):
                yield delta.text

        yield reply


def converse(reply: Reply, system: str | None, console: Console) -> None:
    """The loop of the terminal: reads lines from standard input until it ends."""
    messages = _begin(system)
    interactive = sys.stdin.isatty()
    if interactive:
        console.print(_HELP, style="dim", highlight=False)
    while True:
        try:
            line = input("you> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/help":
            console.print(_HELP, style="dim", highlight=False)
        elif line == "/reset":
            messages = _begin(system)
        elif line.startswith("/system"):
            system = line.removeprefix("/system").strip() or None
            messages = _begin(system)
        elif line:
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": _answer(reply, messages, console)})


def _begin(system: str | None) -> list[ChatMessage]:
    return [{"role": "system", "content": system}] if system else []


def _answer(reply: Reply, messages: list[ChatMessage], console: Console) -> str:
    """Streams one answer to the terminal and returns its text; an error is shown, not raised."""
    pieces: list[str] = []
    try:
        for piece in reply(messages):
            pieces.append(piece)
            console.out(piece, end="", highlight=False)
    except KeyboardInterrupt:
        console.out(" [stopped]", end="", style="dim")
    except DiptychError as error:
        console.print(f"error: {error.message}", style="red", highlight=False)
    console.out("")
    return "".join(pieces)


def main(args: argparse.Namespace) -> int:
    SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens).verify()
    console = Console()
    if args.model is None:
        converse(server_reply(args), args.system, console)
        return 0
    with local_reply(args) as reply:
        converse(reply, args.system, console)
    return 0
