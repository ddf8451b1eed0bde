"""Python's garbage collector in the processes of an engine: seldom, and not over what is loaded.

Owns the thresholds. What is made per token or message holds no cycles and goes by its count of
references; looking at it after every 700 objects cost a twentieth of a batcher's step.
"""

import gc
from typing import Final

_THRESHOLDS: Final = (20_000, 20, 100)


def calm_collector() -> None:
    """Call once, when the code is loaded."""
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
