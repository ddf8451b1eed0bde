"""One safetensors file, mapped: header checked in full before any tensor is read.

Owns the mapping. Invariant: after `open` every tensor lies inside the file with the size that its
shape and dtype ask for, so reading one cannot fail. The mapping is private: nothing is written.
"""

import json
import math
import mmap
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from diptych.engine.core.errors import ModelLoadError

_HEADER_BYTES_MAX: Final = 100_000_000
_FLOATS: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WHOLE_BYTES: Final = 1 << 20  # tensors up to this size are digested in full
_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: bytes [begin, end) of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """`entries` by tensor name; `tensor` views the mapping, valid as long as the tensor lives."""

    __slots__ = ("_map", "entries", "path")

    def __init__(self, path: Path) -> None:
        """Raises ModelLoadError naming the file and the reason."""
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise self._bad(f"cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise self._bad("is empty") from error
        self.entries = self._read_header()

    def _bad(self, reason: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path}: {reason}")

    def _read_header(self) -> dict[str, Entry]:
        size = len(self._map)
        header_bytes = int.from_bytes(self._map[:8], "little")
        if size < 8 or not 2 <= header_bytes <= _HEADER_BYTES_MAX:
            raise self._bad("is no safetensors file (its header length makes no sense)")
        data = 8 + header_bytes  # where tensor data begins
        if data > size:
            raise self._bad(f"is truncated: its header needs {data} bytes, the file has {size}")
        try:
            header = json.loads(self._map[8:data])
        except (ValueError, RecursionError) as error:
            raise self._bad(f"has a broken header ({error})") from error
        if not isinstance(header, dict):
            raise self._bad("has a broken header (no JSON object)")
        header.pop("__metadata__", None)
        entries = {name: self._entry(name, value, data) for name, value in header.items()}
        expected = max((entry.end for entry in entries.values()), default=data)
        if expected > size:
            raise self._bad(f"is truncated: its tensors need {expected} bytes, it has {size}")
        if expected < size:
            raise self._bad(f"has {size - expected} bytes that belong to no tensor")
        return entries

    def _entry(self, name: str, value: object, data: int) -> Entry:
        try:
            dtype, shape, (begin, end) = (
                value["dtype"],  # type: ignore[index]  # TypeError is the answer
                tuple(value["shape"]),  # type: ignore[index]
                value["data_offsets"],  # type: ignore[index]
            )
            sizes = [*shape, begin, end]
            legal = all(type(number) is int and number >= 0 for number in sizes)
        except (KeyError, TypeError, ValueError) as error:
            raise self._bad(f"has a broken header entry for {name!r}") from error
        if not legal or begin > end or not isinstance(dtype, str):
            raise self._bad(f"has a broken header entry for {name!r}")
        if dtype in _FLOATS and math.prod(shape) * _FLOATS[dtype].itemsize != end - begin:
            raise self._bad(f"gives {name!r} {end - begin} bytes, which is not {dtype}{shape}")
        return Entry(dtype, shape, data + begin, data + end)

    def tensor(self, name: str) -> Tensor:
        """The stored tensor, float32, float16 or bfloat16; other dtypes are refused."""
        entry = self.entries[name]
        dtype = _FLOATS.get(entry.dtype)
        if dtype is None:
            raise self._bad(
                f"{name!r} is stored as {entry.dtype}; only F32, F16 and BF16 are supported"
            )
        count = math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=dtype)
        if entry.begin % dtype.itemsize:
            raw = torch.frombuffer(self._map, dtype=torch.uint8, offset=entry.begin)
            return raw[: entry.end - entry.begin].clone().view(dtype).view(entry.shape)
        flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=entry.begin)
        return flat.view(entry.shape)

    def digest(self, name: str) -> bytes:
        """Of dtype, shape and content; of large tensors evenly spread samples stand for all."""
        entry = self.entries[name]
        digest = sha256(f"{name}\0{entry.dtype}{entry.shape}".encode())
        size = entry.end - entry.begin
        if size <= _WHOLE_BYTES:
            digest.update(self._map[entry.begin : entry.end])
            return digest.digest()
        for sample in range(_SAMPLES):
            begin = entry.begin + (size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1)
            digest.update(self._map[begin : begin + _SAMPLE_BYTES])
        return digest.digest()
