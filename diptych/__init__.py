"""Diptych: a disaggregated prefill/decode serving engine for large language models.

Importing this package is cheap: the engine (and with it torch) loads on first use of `Engine`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diptych.engine.core.params import SamplingParams
    from diptych.server.engine import Engine

__version__ = "0.1.0"
__all__ = ["Engine", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    if name == "Engine":
        from diptych.server.engine import Engine

        return Engine
    if name == "SamplingParams":
        from diptych.engine.core.params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'diptych' has no attribute {name!r}")
