"""The root of an API server process: orders in, the front door's function called, exit status out.

Owns nothing. Invariant: it does not outlive its supervisor; its connections end with it.
"""

import importlib
import logging
import sys
from collections.abc import Callable

import msgspec

from diptych.server.boot import ApiBoot, ApiProcessBoot
from diptych.server.collector import calm_collector
from diptych.server.lifeline import EXIT_FAULT, die_by_thread, leave_signals_to_supervisor
from diptych.server.logs import configure_logs
from diptych.transfer.processes import name_process


def load_target(target: str) -> Callable[[ApiBoot], None]:
    """ "package.module:function" -> the function."""
    module, _, name = target.partition(":")
    function: Callable[[ApiBoot], None] = getattr(importlib.import_module(module), name)
    return function


def main() -> None:
    """`python -m diptych.server.api_process TARGET`, orders on standard input."""
    leave_signals_to_supervisor()
    target = load_target(sys.argv[1])  # while the model loads
    orders = sys.stdin.buffer.read()
    if not orders:
        return  # the supervisor ended before there was anything to serve
    boot = msgspec.json.decode(orders, type=ApiProcessBoot)
    configure_logs(f"api{boot.api.api}.{boot.api.api_epoch}", boot.api.log_level)
    name_process(f"api{boot.api.api}")
    die_by_thread(boot.lifeline_fd, lambda: None)
    calm_collector()
    try:
        target(boot.api)
    except Exception:
        logging.getLogger("diptych").exception("the API server ends by an uncaught exception")
        sys.exit(EXIT_FAULT)


if __name__ == "__main__":
    main()
