"""The `diptych` command: serve, chat, bench.

The only place that reads environment variables (`DIPTYCH_*` defaults of flags). Parsing imports
nothing heavy, so `diptych --help` answers at once.
"""

import argparse
import sys
from collections.abc import Sequence

from diptych import __version__
from diptych.engine.core.errors import DiptychError
from diptych.server import chat, serve
from diptych.server.load import run as load

_DESCRIPTION = """\
Diptych serves large language models through separate prefill and decode workers.

  diptych serve                     serve the built-in model on http://127.0.0.1:8000
  diptych serve ./my-model          serve a Hugging Face checkpoint (safetensors)
  diptych chat                      talk to the server in the terminal
  diptych bench                     measure the server under load
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diptych",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"diptych {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module, text in (
        ("serve", serve, "serve a model over an OpenAI-compatible HTTP API"),
        ("chat", chat, "talk to a server or a model in the terminal"),
        ("bench", load, "put a load on a server and report latencies and throughput"),
    ):
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. A user's mistake is one line, not a traceback."""
    args = build_parser().parse_args(argv)
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
