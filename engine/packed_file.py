"""Packed weights in a file: mapped and served as they are, without packing.

Layout: magic, length of the header (8 bytes, little endian), header (JSON), then tensors at
multiples of 64 bytes from the next page on. Owns reading, writing and the check. Invariant: a file
is there whole or not at all (it is renamed into place once it is on disk), and one that was packed
for other kernels, another version, rounding or configuration is refused with the reason. The name
of this format's version is `SHAPE_VERSION` with everything else of `PackedKey`.
"""

import math
import mmap
import os
from bisect import bisect_right
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from torch import Tensor

from diptych.engine.core.errors import ModelLoadError
from diptych.engine.models.weights import DecoderWeights
from diptych.engine.weights_tree import dtype_name, dtype_of, rebuild, take_apart

__all__ = ["PACKED_NAME", "PackedKey", "PackedWeights", "open_packed", "read_key", "write_packed"]

PACKED_NAME: Final = "weights.diptych"  # inside a model's folder
_MAGIC: Final = b"DIPTYCHW"
_HEADER_BYTES_MAX: Final = 100_000_000
_ALIGN: Final = 64
_SAMPLES: Final = 256
_SAMPLE_BYTES: Final = 4096


class PackedKey(msgspec.Struct, frozen=True, kw_only=True):
    """What must be equal for packed weights to be of use."""

    shape_version: str
    kernels: str  # fingerprint: backend, version of its numerics, level
    numerics: str  # digest of the configuration
    dtype: str
    quantization: str | None
    num_shards: int


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    begin: int  # byte, from the first one after the header's page
    dtype: str
    shape: list[int]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * dtype_of(self.dtype).itemsize


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    key: PackedKey
    identity: str  # of the checkpoint
    tree: Any
    tensors: list[_Entry]
    samples: str  # digest of evenly spread pieces of the data


class PackedWeights(msgspec.Struct, frozen=True):
    weights: DecoderWeights
    identity: str


def write_packed(path: Path, key: PackedKey, identity: str, weights: DecoderWeights) -> int:
    """Returns the file's size. Raises ModelLoadError when it cannot be written."""
    tree, tensors = take_apart(weights)
    flat = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    entries, end = [], 0
    for tensor, raw in zip(tensors, flat, strict=True):
        entries.append(_Entry(end, dtype_name(tensor.dtype), list(tensor.shape)))
        end += -(-raw.numel() // _ALIGN) * _ALIGN
    _remove_leftovers(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            header = _Header(
                key=key,
                identity=identity,
                tree=tree,
                tensors=entries,
                samples=_digest(lambda begin, size: _piece(flat, entries, begin, size), end),
            )
            file.write(_frame(header))
            for raw in flat:
                file.write(raw.numpy().data)
                file.write(bytes(-raw.numel() % _ALIGN))
            file.flush()
            os.fsync(file.fileno())
            num_bytes = file.tell()
        temporary.rename(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise ModelLoadError(f"{path}: cannot be written ({error.strerror})") from error
    return num_bytes


def read_key(path: Path) -> PackedKey:
    """What the file was packed for. Raises ModelLoadError."""
    return _read_header(path, _map(path))[0].key


def open_packed(path: Path, key: PackedKey) -> PackedWeights:
    """The weights over the mapped file. Raises ModelLoadError."""
    mapped = _map(path)
    header, data = _read_header(path, mapped)
    _check_key(path, header.key, key)
    end = 0
    for entry in header.tensors:
        if entry.begin != end or min(entry.shape, default=0) < 0:
            raise ModelLoadError(f"{path}: has a broken header")
        end += -(-entry.num_bytes // _ALIGN) * _ALIGN
    if len(mapped) != data + end:
        raise ModelLoadError(f"{path}: has {len(mapped)} bytes, not the {data + end} it needs")
    samples = _digest(lambda begin, size: mapped[data + begin : data + begin + size], end)
    if samples != header.samples:
        raise ModelLoadError(f"{path}: is damaged; pack the model again")
    with suppress(OSError):
        mapped.madvise(mmap.MADV_WILLNEED)
    tensors = [_view(mapped, data, entry) for entry in header.tensors]
    weights = rebuild(header.tree, tensors)
    if not isinstance(weights, DecoderWeights):
        raise ModelLoadError(f"{path}: holds no decoder")
    return PackedWeights(weights, header.identity)


def _remove_leftovers(path: Path) -> None:
    """Of writers that were killed."""
    for left in path.parent.glob(f"{path.name}.*.tmp"):
        pid = left.name.removesuffix(".tmp").rpartition(".")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            with suppress(OSError):
                left.unlink()


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ModelLoadError(f"{path}: is empty") from error


def _frame(header: _Header) -> bytes:
    body = msgspec.json.encode(header)
    framed = _MAGIC + len(body).to_bytes(8, "little") + body
    return framed + bytes(-len(framed) % mmap.PAGESIZE)


def _read_header(path: Path, mapped: mmap.mmap) -> tuple[_Header, int]:
    """The header, and where the data begins."""
    size = int.from_bytes(mapped[8:16], "little")
    if mapped[:8] != _MAGIC or not 0 < size <= min(_HEADER_BYTES_MAX, len(mapped) - 16):
        raise ModelLoadError(f"{path}: holds no packed weights")
    try:
        header = msgspec.json.decode(mapped[16 : 16 + size], type=_Header)
    except msgspec.MsgspecError as error:
        raise ModelLoadError(f"{path}: was packed by another version; pack again") from error
    return header, -(-(16 + size) // mmap.PAGESIZE) * mmap.PAGESIZE


def _check_key(path: Path, found: PackedKey, wanted: PackedKey) -> None:
    for field in PackedKey.__struct_fields__:
        packed, asked = getattr(found, field), getattr(wanted, field)
        if packed == asked:
            continue
        if field in ("shape_version", "numerics"):
            raise ModelLoadError(f"{path}: was packed by another version or model; pack again")
        raise ModelLoadError(
            f"{path}: was packed for {field} {packed}, asked for is {asked}; pack again, or serve"
            " with the options it was packed with"
        )


def _view(mapped: mmap.mmap, data: int, entry: _Entry) -> Tensor:
    dtype, count = dtype_of(entry.dtype), math.prod(entry.shape)
    if count == 0:
        return torch.empty(entry.shape, dtype=dtype)
    flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=data + entry.begin)
    return flat.view(entry.shape)


def _piece(flat: list[Tensor], entries: list[_Entry], begin: int, size: int) -> bytes:
    """Bytes [begin, begin + size) of the data, the zeros between tensors included."""
    piece = bytearray(size)
    first = bisect_right(entries, begin, key=lambda entry: entry.begin) - 1
    for entry, raw in zip(entries[first:], flat[first:], strict=True):
        low, high = max(begin, entry.begin), min(begin + size, entry.begin + raw.numel())
        if entry.begin >= begin + size:
            break
        if low < high:
            part = raw[low - entry.begin : high - entry.begin]
            piece[low - begin : high - begin] = part.numpy().tobytes()
    return bytes(piece)


def _digest(read: Callable[[int, int], bytes], num_bytes: int) -> str:
    digest = sha256(num_bytes.to_bytes(8, "little"))
    step = max(1, (num_bytes - _SAMPLE_BYTES) // _SAMPLES)
    for begin in range(0, max(1, num_bytes - _SAMPLE_BYTES + 1), step):
        digest.update(read(begin, min(_SAMPLE_BYTES, num_bytes - begin)))
    return digest.hexdigest()
