"""Finds and loads the C++ library (`_C.so`), once per process.

It lies beside this file in a source checkout that was built, and in `diptych/kernels` of the
installed distribution otherwise (an editable install has its sources in one place and its library
in the other).
"""

import functools
import importlib.metadata
from pathlib import Path

import tvm_ffi

from diptych.engine.core.errors import ConfigError

__all__ = ["HOW_TO_BUILD", "find", "load"]

HOW_TO_BUILD = (
    "the C++ library is not built; run `pip install .`, or in a source checkout "
    "`cmake -S . -B build/dev && cmake --build build/dev`"
)


def find() -> Path | None:
    """Where the library lies, or None."""
    beside = Path(__file__).with_name("_C.so")
    if beside.is_file():
        return beside
    try:
        distribution = importlib.metadata.distribution("diptych")
    except importlib.metadata.PackageNotFoundError:
        return None
    installed = Path(str(distribution.locate_file("diptych/kernels/_C.so")))
    return installed if installed.is_file() else None


@functools.cache
def load() -> tvm_ffi.Module:
    """The loaded library; the same object in every call."""
    path = find()
    if path is None:
        raise ConfigError(HOW_TO_BUILD)
    return tvm_ffi.load_module(path)
