"""`diptych status`: a running server in the terminal, once or live, or as JSON.

Owns nothing. Rates are differences between two readings.
"""

import argparse
import json
import time
import urllib.error
import urllib.request
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from diptych.engine.core.errors import ConfigError, DiptychError

_WATCH_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="server to ask (default: %(default)s)")
    add("--api-key", help="key for the server")
    add("--json", action="store_true", help="print JSON once and end")
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


def render(info: dict[str, Any], before: dict[str, Any] | None, seconds: float) -> Group:
    """`before` is an earlier reading, `seconds` old, for the rates; None shows none."""
    model, health, engine = info["model"], info["health"], info["engine"]
    state = "healthy" if health["ok"] else f"NOT healthy: {health['reason']}"
    lines = [
        f"{', '.join(info['models'])}  ({model['dtype']}, context {model['max_model_len']}), "
        f"diptych {info['version']}: {state}"
    ]
    if engine is None:
        return Group(Text(lines[0]))
    used, cached, total = (engine[f"blocks_{name}"] for name in ("used", "cached", "total"))
    lines.append(
        f"requests: {engine['running']} running, {engine['waiting']} waiting, "
        f"{info['in_flight']} HTTP in flight, {engine['rejections']} rejected"
    )
    lines.append(
        f"KV: {used} of {total} blocks in use ({used / max(1, total):.1%}), {cached} cached; "
        f"prefix hits {engine['prefix_hits'] / max(1, engine['prefix_queries']):.1%}; "
        f"{engine['preemptions']} preemptions, {engine['losses']} losses"
    )
    rate = None
    if before is not None and before["engine"] is not None and seconds > 0:
        rate = (info["generated_tokens"] - before["generated_tokens"]) / seconds
    lines.append(
        f"tokens: {info['generated_tokens']} generated"
        + ("" if rate is None else f", {rate:.1f}/s now")
    )
    return Group(*(Text(line) for line in lines), _workers(engine))


def _workers(engine: dict[str, Any]) -> Table:
    table = Table()
    for name in ("worker", "incarnation", "dial", "role", "sequences", "steps", "step ms"):
        table.add_column(name, justify="left" if name == "role" else "right")
    for row in engine["workers"]:
        role = {100: "prefill", 0: "decode"}.get(row["dial"], "mixed")
        numbers = (row["worker"], row["worker_epoch"], row["dial"])
        table.add_row(
            *map(str, numbers),
            role,
            str(row["running"]),
            str(row["steps"]),
            f"{row['step_s'] * 1e3:.2f}",
        )
    return table


def main(args: argparse.Namespace) -> int:
    """The exit status is 0 for a healthy server, 1 for another."""
    info = read(args.url, args.api_key)
    if args.json:
        print(json.dumps(info, indent=1))
    elif args.watch:
        _watch(args, info)
    else:
        Console().print(render(info, None, 0.0), highlight=False)
    return 0 if info["health"]["ok"] else 1


def _watch(args: argparse.Namespace, info: dict[str, Any]) -> None:
    read_at = time.monotonic()
    with Live(render(info, None, 0.0), auto_refresh=False) as live:
        try:
            while True:
                time.sleep(_WATCH_S)
                before, before_at = info, read_at
                info, read_at = read(args.url, args.api_key), time.monotonic()
                live.update(render(info, before, read_at - before_at), refresh=True)
        except KeyboardInterrupt:
            return
