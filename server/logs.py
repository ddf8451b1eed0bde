"""The log of a process: one logger, lines for people, to standard error.

Owns the format. Invariant: a line names the process and never holds a prompt, an answer or a key.
"""

import logging
import sys


def configure_logs(process: str, level: str) -> logging.Logger:
    """Called once at the root of a process, again after a fork."""
    logger = logging.getLogger("diptych")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    line = f"%(asctime)s.%(msecs)03d %(levelname)-7s {process:<12} %(message)s"
    handler.setFormatter(logging.Formatter(line, "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False
    return logger
