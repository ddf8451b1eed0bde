"""The slow, obvious backend in torch: the oracle of every other one.

Each output row is computed on its own, in fp64, from inputs rounded as the contract says, then
rounded once to fp32; so it is independent of the batch by construction. Meant for tests and for
machines without the C++ library; never for speed.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diptych.engine.core.types import KV_SCALE_BYTES
from diptych.kernels.base import DRAW_SPAN, DecoderParts, PackedLinear
from diptych.kernels.narrow import Narrow, round_int4, round_int8, round_rows
from diptych.kernels.philox import uniforms

__all__ = ["ReferenceKernels"]


class ReferenceKernels:
    """`Kernels` without tricks."""

    @property
    def level(self) -> str:
        return "reference"

    def fingerprint(self) -> str:
        return "reference-3"

    def set_num_threads(self, num_threads: int) -> None:
        assert num_threads >= 1

    def share_cores(
        self, table: Tensor, slot: int, cores: Sequence[int], prefill_share: int
    ) -> None:
        """One thread, wherever it is."""

    def pack_into(self, empty: Callable[[int, torch.dtype], Tensor] | None) -> None:
        """Results are copies, wherever torch puts them."""

    def pack_linear(
        self,
        weight: Tensor | Sequence[Tensor],
        bias: Tensor | None,
        narrow: Narrow | None = None,
    ) -> PackedLinear:
        if not isinstance(weight, Tensor):
            weight = torch.cat(list(weight))
        num_out, num_in = weight.shape
        data, scales = weight.detach().clone().contiguous(), None
        if narrow is not None and narrow.bits == 8:
            data, scales = round_int8(data)
        elif narrow is not None:
            padded = -(-num_in // narrow.group) * narrow.group
            integers, steps = round_int4(_pad_columns(data, padded), narrow.group)
            widened = integers.float().view(num_out, -1, narrow.group) * steps[:, :, None]
            data = widened.flatten(1)[:, :num_in].contiguous()
        return PackedLinear(
            data=data,
            bias=None if bias is None else bias.detach().float(),
            num_out=num_out,
            num_in=num_in,
            dtype=weight.dtype,
            narrow=narrow,
            scales=scales,
        )

    def linear(self, out: Tensor, x: Tensor, w: PackedLinear) -> None:
        if w.narrow is not None:
            integers, steps = round_rows(x, w.narrow.act_bits)
            x = integers.double() * steps.double()[:, None]
        elif w.dtype == torch.bfloat16:
            x = x.to(torch.bfloat16)
        weight = w.data.double()  # [N, K]
        if w.scales is not None:
            weight = weight * w.scales.double()[:, None]
        bias = 0.0 if w.bias is None else w.bias.double()  # [N]
        for t in range(x.shape[0]):
            out[t] = torch.mv(weight, x[t].double()) + bias

    def sum_parts(self, out: Tensor, parts: Tensor) -> None:
        total = out.view(-1).copy_(parts[0])
        for part in parts[1:]:
            total += part

    def embedding(self, out: Tensor, table: Tensor | PackedLinear, ids: Tensor) -> None:
        rows = table if isinstance(table, Tensor) else table.data  # [V, D]
        out.copy_(rows[ids.long()])

    def rms_norm(self, out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
        for t in range(x.shape[0]):
            row = x[t].double()  # [D]
            out[t] = row / torch.sqrt(row.square().mean() + eps) * weight.double()

    def add_rms_norm(
        self, out: Tensor, residual: Tensor, x: Tensor, weight: Tensor, eps: float
    ) -> None:
        residual += x
        self.rms_norm(out, residual, weight, eps)

    def rope(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        half = q.shape[-1] // 2
        rows = cos_sin[positions.long()].double()  # [T, D]
        cos, sin = rows[:, None, :half], rows[:, None, half:]  # [T, 1, D/2]
        for x in (q, k):
            low, high = x[..., :half].double(), x[..., half:].double()  # [T, H, D/2]
            x[..., :half] = low * cos - high * sin
            x[..., half:] = high * cos + low * sin

    def silu_mul(self, out: Tensor, gate_up: Tensor) -> None:
        gate, up = gate_up.double().chunk(2, dim=-1)  # [T, F]
        out.copy_(gate * torch.sigmoid(gate) * up)

    def write_kv(
        self, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor
    ) -> None:
        block_size, dim = k_cache.shape[2], k.shape[2]
        for t, slot in enumerate(slot_mapping.tolist()):
            if slot < 0:
                continue
            block, offset = divmod(slot, block_size)
            for cache, row in ((k_cache, k[t]), (v_cache, v[t])):  # row: [Hk, D]
                if cache.dtype == torch.int8:
                    integers, scales = round_rows(row, 8)
                    cache[block, :, offset, :dim] = integers.to(torch.int8)
                    cache[block, :, offset, dim:] = scales[:, None].view(torch.int8)
                else:
                    cache[block, :, offset] = row.to(cache.dtype)

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
        group = q.shape[1] // k_cache.shape[1]
        rows, blocks = qo_indptr.tolist(), kv_indptr.tolist()
        for s, length in enumerate(kv_len.tolist()):
            table = kv_indices[blocks[s] : blocks[s + 1]].long()
            keys = _gather(k_cache, table, length)  # [Hk, kv_len, D] fp64
            values = _gather(v_cache, table, length)
            for t in range(rows[s], rows[s + 1]):
                end = length - (rows[s + 1] - t) + 1  # keys this row sees: [start, end)
                start = max(0, end - window) if window > 0 else 0
                query = q[t].double().reshape(-1, group, q.shape[2])  # [Hk, group, D]
                scores = query @ keys[:, start:end].transpose(1, 2) * scale
                weights = torch.softmax(scores, dim=-1)  # [Hk, group, seen]
                out[t] = (weights @ values[:, start:end]).flatten(0, 1)

    def fuse_decoder(self, parts: DecoderParts) -> None:
        """Single calls only."""

    def argmax_logprob(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.empty(logits.shape[0], dtype=torch.int32)
        logprobs = torch.empty(logits.shape[0], dtype=torch.float32)
        for r, row in enumerate(logits.double()):
            top = float(row.max())
            if not math.isfinite(top):
                ids[r], logprobs[r] = -1, math.nan
                continue
            ids[r] = int((row == top).nonzero()[0, 0])
            logprobs[r] = top - torch.logsumexp(row, dim=0)
        return ids, logprobs

    def draw(
        self,
        weights: NDArray[np.float64],
        spans: NDArray[np.float64],
        keys: NDArray[np.uint64],
    ) -> list[int]:
        seeds, choices, positions = keys.T.tolist()
        targets = uniforms(seeds, choices, positions) * spans[:, -1]  # below the whole: it is >= 1
        found = []
        for row, sums, target in zip(weights, spans, targets, strict=True):
            span = int((sums <= target).sum())
            before = sums[span - 1] if span else 0.0
            parts = row[span * DRAW_SPAN : (span + 1) * DRAW_SPAN]
            index = int((before + np.cumsum(parts) <= target).sum())
            if index == parts.size:  # only by the rounding of the two sums
                index = int(np.flatnonzero(parts)[-1])
            found.append(span * DRAW_SPAN + index)
        return found

    def draw_plain(
        self,
        logits: Tensor,
        index: NDArray[np.int32],
        temperatures: NDArray[np.float64],
        keys: NDArray[np.uint64],
    ) -> list[int]:
        return [-1] * len(index)  # it takes the weights to know

    def log_softmax(self, out: Tensor, logits: Tensor) -> None:
        for r, row in enumerate(logits.double()):
            finite = math.isfinite(float(row.max()))
            out[r] = row - torch.logsumexp(row, dim=0) if finite else math.nan


def _pad_columns(weight: Tensor, columns: int) -> Tensor:
    """weight: [N, K] -> [N, columns], zeros behind."""
    return torch.nn.functional.pad(weight, (0, columns - weight.shape[1]))


def _gather(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """The first `length` tokens of a sequence, [Hk, length, D] fp64, from cache [num_blocks, Hk,
    block_size, D], of int8 with a scale behind each row.
    """
    picked = cache[table]  # [blocks, Hk, block_size, D or D + KV_SCALE_BYTES]
    if cache.dtype == torch.int8:
        scales = picked[..., -KV_SCALE_BYTES:].contiguous().view(torch.float32)
        picked = picked[..., :-KV_SCALE_BYTES].double() * scales.double()
    picked = picked.double()
    num_blocks, heads, block_size, dim = picked.shape
    return picked.transpose(0, 1).reshape(heads, num_blocks * block_size, dim)[:, :length]
