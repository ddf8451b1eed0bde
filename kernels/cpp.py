"""The C++ backend for CPUs (csrc/cpu), bound with apache-tvm-ffi.

Owns nothing but the chosen level; the thread pool belongs to the library, one per process. Tensors
go to C++ as they are (no copies, strided views included) and are checked there: a wrong shape or
dtype raises AssertionError. Calls release the GIL.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diptych.engine.core.errors import ConfigError
from diptych.kernels import library
from diptych.kernels.base import DecoderParts, PackedLinear
from diptych.kernels.cpp_decoder import CppDecoder
from diptych.kernels.narrow import Narrow
from diptych.kernels.narrow_layout import pack_int4, pack_int8

__all__ = ["CppKernels", "available_levels", "level_index"]

# Raised with every change of the C++ code that may change a bit of a result.
_NUMERICS_VERSION = 8

_NARROW_INPUTS_MAX = 1 << 16  # of narrow layers: what 32-bit sums hold for sure
_PANEL = 16  # outputs that are packed together, kPanel of csrc/cpu/kernels.h
_MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available_levels() -> list[str]:
    """The levels that this machine can run, the slowest first."""
    lib = library.load()
    levels = [level for level in range(lib.num_levels()) if lib.machine_has(level)]
    return [str(lib.level_name(level)) for level in sorted(levels, key=lib.level_rank)]


def level_index(level: str) -> int:
    """The library's own number of a level."""
    lib = library.load()
    names = [str(lib.level_name(index)) for index in range(lib.num_levels())]
    return names.index(level)


def _empty(size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype)


class CppKernels:
    """`Kernels` in C++. Two objects may use different levels in one process; both share its
    threads.
    """

    def __init__(self, level: str | None = None) -> None:
        """level: one of `available_levels()`; None takes the best."""
        lib = library.load()
        self._packed_size: Callable[..., int] = lib.packed_size
        self._pack_linear: Callable[..., None] = lib.pack_linear
        self._linear: Callable[..., None] = lib.linear
        self._linear_narrow: Callable[..., None] = lib.linear_narrow
        self._sum_parts: Callable[..., None] = lib.sum_parts
        self._embedding: Callable[..., None] = lib.embedding
        self._embedding_packed: Callable[..., None] = lib.embedding_packed
        self._rms_norm: Callable[..., None] = lib.rms_norm
        self._add_rms_norm: Callable[..., None] = lib.add_rms_norm
        self._rope: Callable[..., None] = lib.rope
        self._silu_mul: Callable[..., None] = lib.silu_mul
        self._write_kv: Callable[..., None] = lib.write_kv
        self._attention: Callable[..., None] = lib.attention
        self._argmax_logprob: Callable[..., None] = lib.argmax_logprob
        self._draw: Callable[..., None] = lib.draw
        self._draw_plain: Callable[..., None] = lib.draw_plain
        self._log_softmax: Callable[..., None] = lib.log_softmax
        self._set_num_threads: Callable[[int], None] = lib.set_num_threads
        self.pack_into(None)
        self.set_level(available_levels()[-1] if level is None else level)

    def set_level(self, level: str) -> None:
        """Use this instruction set in later calls; packed weights stay valid."""
        levels = available_levels()
        if level not in levels:
            raise ConfigError(f"kernel level {level!r} is not one of this machine's: {levels}")
        self._level_name = level
        self._level = level_index(level)

    @property
    def level(self) -> str:
        return self._level_name

    def fingerprint(self) -> str:
        return f"cpp-{_NUMERICS_VERSION}-{self._level_name}"

    def set_num_threads(self, num_threads: int) -> None:
        assert num_threads >= 1
        self._set_num_threads(num_threads)

    def share_cores(
        self, table: Tensor, slot: int, cores: Sequence[int], prefill_share: int
    ) -> None:
        numbers = torch.tensor(cores, dtype=torch.int32)
        library.load().share_cores(table, slot, numbers, prefill_share)

    def pack_into(self, empty: Callable[[int, torch.dtype], Tensor] | None) -> None:
        self._empty = _empty if empty is None else empty

    def pack_linear(
        self,
        weight: Tensor | Sequence[Tensor],
        bias: Tensor | None,
        narrow: Narrow | None = None,
    ) -> PackedLinear:
        parts = [weight] if isinstance(weight, Tensor) else list(weight)
        if narrow is not None or any(part.shape[0] % _PANEL for part in parts[:-1]):
            parts = [torch.cat(parts)]
        dtype = parts[0].dtype
        assert dtype in _MODEL_DTYPES
        num_out, num_in = sum(part.shape[0] for part in parts), parts[0].shape[1]
        if narrow is not None and num_in > _NARROW_INPUTS_MAX:
            raise ConfigError(
                f"quantized layers may have {_NARROW_INPUTS_MAX} inputs, not {num_in}"
            )
        scales: Tensor | None = None
        if narrow is None:
            packed = self._pack_parts(parts, num_out, num_in)
        elif narrow.bits == 8:
            packed, scales = pack_int8(parts[0].detach())
        else:
            packed, scales = pack_int4(parts[0].detach(), narrow.group)
        return PackedLinear(
            data=packed,
            bias=None if bias is None else bias.detach().to(torch.float32, copy=True).contiguous(),
            num_out=num_out,
            num_in=num_in,
            dtype=dtype,
            narrow=narrow,
            scales=scales,
        )

    def _pack_parts(self, parts: list[Tensor], num_out: int, num_in: int) -> Tensor:
        """Each part fills whole panels, so it is packed as a layer of its own, in its place."""
        dtype = parts[0].dtype
        size = self._packed_size(num_out, num_in, dtype == torch.bfloat16)
        packed, done = self._empty(size, dtype), 0
        for part in parts:
            end = done + self._packed_size(part.shape[0], num_in, dtype == torch.bfloat16)
            self._pack_linear(self._level, packed[done:end], part.detach().contiguous())
            done = end
        assert done == size
        return packed

    def linear(self, out: Tensor, x: Tensor, w: PackedLinear) -> None:
        if w.narrow is None:
            self._linear(self._level, out, x, w.data, w.bias)
        else:
            bits, group, act_bits = w.narrow.bits, w.narrow.group, w.narrow.act_bits
            self._linear_narrow(
                self._level, out, x, w.data, w.scales, w.bias, bits, group, act_bits
            )

    def sum_parts(self, out: Tensor, parts: Tensor) -> None:
        self._sum_parts(out, parts)

    def embedding(self, out: Tensor, table: Tensor | PackedLinear, ids: Tensor) -> None:
        if isinstance(table, Tensor):
            self._embedding(self._level, out, table, ids)
        else:
            assert table.narrow is None, "a narrow table"
            self._embedding_packed(self._level, out, table.data, ids, table.num_out)

    def rms_norm(self, out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
        self._rms_norm(self._level, out, x, weight, eps)

    def add_rms_norm(
        self, out: Tensor, residual: Tensor, x: Tensor, weight: Tensor, eps: float
    ) -> None:
        self._add_rms_norm(self._level, out, residual, x, weight, eps)

    def rope(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        self._rope(self._level, q, k, positions, cos_sin)

    def silu_mul(self, out: Tensor, gate_up: Tensor) -> None:
        self._silu_mul(self._level, out, gate_up)

    def write_kv(
        self, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor
    ) -> None:
        self._write_kv(self._level, k_cache, v_cache, k, v, slot_mapping)

    def attention(
        self,
        out: Tensor,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len: Tensor,
        scale: float,
        window: int,
    ) -> None:
        self._attention(
            self._level,
            out,
            q,
            k_cache,
            v_cache,
            qo_indptr,
            kv_indptr,
            kv_indices,
            kv_len,
            scale,
            window,
        )

    def fuse_decoder(self, parts: DecoderParts) -> CppDecoder:
        return CppDecoder(self._level, parts)

    def argmax_logprob(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.empty(logits.shape[0], dtype=torch.int32)
        logprobs = torch.empty(logits.shape[0], dtype=torch.float32)
        self._argmax_logprob(self._level, ids, logprobs, logits)
        return ids, logprobs

    def draw(
        self,
        weights: NDArray[np.float64],
        spans: NDArray[np.float64],
        keys: NDArray[np.uint64],
    ) -> list[int]:
        tokens = np.empty(len(keys), dtype=np.int32)
        self._draw(tokens, keys, weights, spans)
        drawn: list[int] = tokens.tolist()
        return drawn

    def draw_plain(
        self,
        logits: Tensor,
        index: NDArray[np.int32],
        temperatures: NDArray[np.float64],
        keys: NDArray[np.uint64],
    ) -> list[int]:
        tokens = np.empty(len(keys), dtype=np.int32)
        self._draw_plain(self._level, tokens, keys, logits, index, temperatures)
        drawn: list[int] = tokens.tolist()
        return drawn

    def log_softmax(self, out: Tensor, logits: Tensor) -> None:
        self._log_softmax(self._level, out, logits)
