"""Functions on tensors: attention, linear, norms; C++ and reference backends (floor 1).

`load` picks a backend; everything above talks to the `Kernels` protocol only.
"""

import logging
from typing import Literal

from diptych.kernels.base import (
    DRAW_SPAN,
    DecodeRows,
    DecoderParts,
    FusedDecoder,
    Kernels,
    LayerParts,
    PackedLinear,
)
from diptych.kernels.narrow import NARROW, Narrow

assert __name__ == "diptych.kernels", "import diptych.kernels, never the bare folder"

__all__ = [
    "DRAW_SPAN",
    "NARROW",
    "DecodeRows",
    "DecoderParts",
    "FusedDecoder",
    "Kernels",
    "LayerParts",
    "Narrow",
    "PackedLinear",
    "load",
]

_log = logging.getLogger(__name__)


def load(
    name: Literal["auto", "cpp", "reference"] = "auto",
    level: str | None = None,
    num_threads: int | None = None,
) -> Kernels:
    """A backend. "auto" takes the C++ one where its library is built, else the reference one, with
    a warning.

    level: an instruction set of the C++ backend; None takes the best this machine has.
    num_threads: None leaves the process's setting alone (first use: 1).
    """
    from diptych.kernels import library

    kernels: Kernels
    if name == "cpp" or (name == "auto" and library.find() is not None):
        from diptych.kernels.cpp import CppKernels

        kernels = CppKernels(level)
    else:
        from diptych.kernels.reference import ReferenceKernels

        if name == "auto":
            _log.warning("slow reference kernels in use: %s", library.HOW_TO_BUILD)
        kernels = ReferenceKernels()
    if num_threads is not None:
        kernels.set_num_threads(num_threads)
    return kernels
