"""`diptych status`: a running server in the terminal, once or live, or as JSON.

Owns nothing; status_view.py draws. Rates are differences between two readings.
"""

import argparse
import json
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress
from typing import Any, Final

from rich.console import Console
from rich.live import Live

from diptych.engine.core.errors import ConfigError, DiptychError
from diptych.server.status_view import Reading, render

_WATCH_S: Final = 1.0
_ONCE_S: Final = 0.5  # between two readings, for the rates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="server to ask (default: %(default)s)")
    add("--api-key", help="key for the server")
    add("--json", action="store_true", help="print JSON (with --watch: a line every second)")
    add("--watch", action="store_true", help="show it live until Ctrl-C")


def read(url: str, api_key: str | None) -> dict[str, Any]:
    """Raises ConfigError when nobody answers, DiptychError when the server refuses."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(f"{url.rstrip('/')}/server_info", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            info: dict[str, Any] = json.load(response)
            return info
    except urllib.error.HTTPError as error:
        with error:
            raise DiptychError(f"the server at {url} answered {error.code}") from error
    except OSError as error:
        raise ConfigError(f"no server answers at {url}: {error}") from error


def main(args: argparse.Namespace) -> int:
    """The exit status is 0 for a healthy server, 1 for another."""
    info = read(args.url, args.api_key)
    if args.watch:
        return _watch(args, info)
    if args.json:
        print(json.dumps(info, indent=1))
    else:
        read_at, before = time.monotonic(), info
        time.sleep(_ONCE_S)
        info = read(args.url, args.api_key)
        console = Console()
        console.print(render(info, before, time.monotonic() - read_at), highlight=False)
    return 0 if info["health"]["ok"] else 1


def _watch(args: argparse.Namespace, info: Reading) -> int:
    """Once a second until Ctrl-C; a server that goes away may come back."""
    show = _print_line if args.json else None
    with ExitStack() as stack:
        if show is None:
            live = stack.enter_context(Live(render(info, None, 0.0), auto_refresh=False))
            show = _Screen(live).show
        before: Reading | None = None
        read_at = time.monotonic()
        with suppress(KeyboardInterrupt):
            while True:
                show(info, before, time.monotonic() - read_at)
                before, read_at = info, time.monotonic()
                time.sleep(_WATCH_S)
                try:
                    info = read(args.url, args.api_key)
                except ConfigError as error:
                    info = _away(before, error.message)
    return 0 if info["health"]["ok"] else 1


def _away(last: Reading, reason: str) -> Reading:
    """What was known last, with the news that nobody answers."""
    return {**last, "health": {"ok": False, "reason": reason}}


def _print_line(info: Reading, before: Reading | None, seconds: float) -> None:
    print(json.dumps(info), flush=True)


class _Screen:
    def __init__(self, live: Live) -> None:
        self._live = live

    def show(self, info: Reading, before: Reading | None, seconds: float) -> None:
        self._live.update(render(info, before, seconds), refresh=True)
