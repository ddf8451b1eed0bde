"""The `diptych` command: serve, pack, chat, status, bench.

Owns the table of commands. Only the module of the chosen command is imported, so `diptych --help`
answers at once and `diptych serve` loads nothing that a supervisor does not need.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Final

from diptych import __version__
from diptych.engine.core.errors import DiptychError

_DESCRIPTION: Final = """\
Diptych serves large language models through separate prefill and decode workers.

  diptych serve                     serve the built-in model on http://127.0.0.1:8000
  diptych serve ./my-model          serve a Hugging Face checkpoint (safetensors)
  diptych serve --ray               let a Ray cluster run the workers (docs/RAY.md)
  diptych join HEAD:PORT            add this host to a server (docs/RAY.md)
  diptych chat                      talk to the server in the terminal
  diptych status                    see what its workers do
  diptych bench                     measure the server under load
"""

COMMANDS: Final = {
    "serve": ("diptych.server.serve", "serve a model over an OpenAI-compatible HTTP API"),
    "pack": ("diptych.server.pack_command", "pack a model's weights into a file that is mapped"),
    "join": ("diptych.server.join", "make this host a part of a server on another host"),
    "chat": ("diptych.server.chat", "talk to a server or a model in the terminal"),
    "status": ("diptych.server.status_command", "show what a running server does"),
    "bench": (
        "diptych.server.load.run",
        "put a load on a server and report latencies and throughput",
    ),
}


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser of all commands; only the chosen one has its flags."""
    parser = argparse.ArgumentParser(
        prog="diptych",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"diptych {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module_name, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name == chosen:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.main)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. A user's mistake is one line, not a traceback."""
    words = sys.argv[1:] if argv is None else list(argv)
    args = build_parser(words[0] if words else None).parse_args(words)
    try:
        status: int = args.run(args)
    except DiptychError as error:
        print(f"diptych {args.command}: {error.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
