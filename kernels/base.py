"""The contract of a kernel backend: every function the engine calls on tensors.

Owns the `Kernels` and `FusedDecoder` protocols and their handles; knows no backend. All activations
are fp32 and contiguous, weights and KV are in the model dtype (fp32, bf16 or fp16) or narrower,
index arrays are int32. Outputs are written in place.

Invariant, for every backend: the order of additions behind one output element depends on nothing
but the shape of its own row: not on the batch, the chunk, the thread count or the physical blocks.
So on one `level` a row computed alone equals, bit for bit, the same row computed among others, and
a decode row equals the same row of a prefill chunk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, dtype

from diptych.kernels.narrow import Narrow

__all__ = [
    "DRAW_SPAN",
    "DecodeRows",
    "DecoderParts",
    "FusedDecoder",
    "Kernels",
    "LayerParts",
    "PackedLinear",
    "StepIndices",
]

DRAW_SPAN: Final = 256
"""Tokens whose weights are summed together before the sums are searched, kSpan of sampling.cc."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """A linear layer's weights in the order its backend reads them; made by `Kernels.pack_linear`.

    `data` is one contiguous tensor, so it can live in memory that several processes map. Its layout
    belongs to the backend (equal on all levels of that backend); nobody else reads it.
    """

    data: Tensor  # [backend's layout], model dtype or bytes
    bias: Tensor | None  # [N], fp32
    num_out: int  # N
    num_in: int  # K
    dtype: dtype  # model dtype: fp32, bf16 or fp16
    narrow: Narrow | None = None  # None: weights in the model's dtype
    scales: Tensor | None = None  # [backend's layout], of narrow weights


@dataclass(frozen=True, slots=True, eq=False)
class LayerParts:
    """All that one decoder layer computes with."""

    attn_norm: Tensor  # [hidden] fp32
    mlp_norm: Tensor  # [hidden] fp32
    q_norm: Tensor | None  # [D] fp32
    k_norm: Tensor | None  # [D] fp32
    qkv: PackedLinear  # hidden -> q, k and v heads
    o: PackedLinear  # q heads -> hidden
    gate_up: PackedLinear  # hidden -> gate, up
    down: PackedLinear  # F -> hidden
    k_cache: Tensor  # as in `Kernels.write_kv`
    v_cache: Tensor
    window: int  # as in `Kernels.attention`


@dataclass(frozen=True, slots=True, eq=False)
class DecoderParts:
    """All that one decoder computes with."""

    layers: Sequence[LayerParts]
    embedding: Tensor | PackedLinear  # as in `Kernels.embedding`
    norm: Tensor  # [hidden] fp32, after the last layer
    head: PackedLinear  # hidden -> vocabulary, in the model's dtype
    cos_sin: Tensor  # as in `Kernels.rope`
    eps: float  # of all norms
    scale: float  # as in `Kernels.attention`
    pulse: Tensor | None  # [1] int64: one is added after each layer, for others to see


class StepIndices(Protocol):
    """The index tensors of a step, each as in `Kernels.rope`, `write_kv` and `attention`."""

    @property
    def positions(self) -> Tensor: ...
    @property
    def slot_mapping(self) -> Tensor: ...
    @property
    def qo_indptr(self) -> Tensor: ...
    @property
    def kv_indptr(self) -> Tensor: ...
    @property
    def kv_indices(self) -> Tensor: ...
    @property
    def kv_len(self) -> Tensor: ...


@dataclass(slots=True, eq=False)
class DecodeRows:
    """A step of one token for each of R sequences. Tensors may be longer than they have to be."""

    num_rows: int  # R
    ids: Tensor  # [R] int32
    positions: Tensor  # [R] int32
    kv_indptr: Tensor  # [R+1] int32 into kv_indices
    kv_indices: Tensor  # [nnz] int32, blocks of each sequence in order, more than it needs or not
    chosen: Tensor  # [R] int32, result: the greedy choice as by `Kernels.argmax_logprob`
    logprobs: Tensor  # [R] fp32, result


class FusedDecoder(Protocol):
    """A decoder over one pool; owns what it computes in. Not for two threads."""

    def run_layers(self, residual: Tensor, indices: StepIndices, outputs: Tensor | None) -> None:
        """All layers of a step. residual: [T, hidden] fp32, the embeddings before and the hidden
        states after. outputs: [n] int32, the sequences, ascending, whose last row is all that is
        needed of the hidden states; the others' are undefined then. Every bit as by single calls.
        """
        ...

    def decode(self, rows: DecodeRows, logits: Tensor, *, choose: bool) -> bool:
        """A whole step. logits: [at least R, V] fp32, result; choose: fill `rows.chosen` and
        `rows.logprobs` too. Every bit as by single calls. False, with nothing done: a row has not
        all the blocks that it needs.
        """
        ...


class Kernels(Protocol):
    """A backend. Preconditions are asserted: breaking one is a bug of the caller, never of a user.

    Letters: T rows (tokens) of the step, S sequences, N outputs and K inputs of a linear layer, Hq
    query heads, Hk KV heads (Hq % Hk == 0), D the size of one head or row, F the MLP's inner size,
    V the vocabulary.
    """

    @property
    def level(self) -> str:
        """The instruction set in use: "amx", "avx512", ..., "plain", or "reference"."""
        ...

    def fingerprint(self) -> str:
        """What identifies the bits of the results: backend, version of its numerics, level.

        Two processes with equal fingerprints compute equal bits from equal inputs.
        """
        ...

    def set_num_threads(self, num_threads: int) -> None:
        """Use this many threads, the caller's included, in later calls; 1 runs everything inline.
        Changes no bit.
        """
        ...

    def share_cores(
        self, table: Tensor, slot: int, cores: Sequence[int], prefill_share: int
    ) -> None:
        """This process is worker `slot` of a host whose workers share `cores`: its threads are
        pinned to them and use those only that are its own by `table` ([slots] uint8, shared memory
        that stays mapped; transfer/core_table.py). Changes no bit. Before the first other call.
        """
        ...

    def pack_into(self, empty: Callable[[int, dtype], Tensor] | None) -> None:
        """Where `pack_linear` takes the memory of its large results from; None: from torch."""
        ...

    def pack_linear(
        self,
        weight: Tensor | Sequence[Tensor],
        bias: Tensor | None,
        narrow: Narrow | None = None,
    ) -> PackedLinear:
        """Reorder `weight` ([N, K], model dtype) and `bias` ([N], any float dtype) for `linear`.
        Keeps neither. `narrow` rounds the weights first (narrow.py).

        Several weights are fused layers of one input (q, k, v; gate, up), one after the other along
        N.
        """
        ...

    def linear(self, out: Tensor, x: Tensor, w: PackedLinear) -> None:
        """`out[t] = W x[t] + bias`; out: [T, N] fp32, x: [T, K] fp32.

        bf16 weights: x is rounded to bf16 (nearest even), products are exact, sums are fp32.
        fp32 and fp16 weights: x stays fp32, fused multiply-add in fp32.
        Narrow weights: each row of x is rounded to integers of `narrow.act_bits` bits with a scale
        of its own (narrow.py), sums of integers are exact, int4 adds its groups in fp32. A backend
        may round x to bf16 instead of 16 bits where that is faster (avx512_bf16; amx with int4). A
        row with a value that is not finite has no finite output. K is at most 65536.
        """
        ...

    def sum_parts(self, out: Tensor, parts: Tensor) -> None:
        """`out = parts[0] + parts[1] + ...`, element by element in this order; out: any shape,
        fp32, parts: [P, out's elements] fp32.
        """
        ...

    def embedding(self, out: Tensor, table: Tensor | PackedLinear, ids: Tensor) -> None:
        """`out[t] = table[ids[t]]`; out: [T, D] fp32, table: [V, D] model dtype, or the packed
        layer of such a table (not narrow); ids: [T] int32 in [0, V).
        """
        ...

    def rms_norm(self, out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
        """`out = x / sqrt(mean(x^2) + eps) * weight` per row; out, x: [T, D] fp32 (may be one
        tensor), weight: [D] fp32.

        For the norm of each head view q as [T * Hq, D].
        """
        ...

    def add_rms_norm(
        self, out: Tensor, residual: Tensor, x: Tensor, weight: Tensor, eps: float
    ) -> None:
        """`residual += x` in place, then `out = rms_norm(residual)`; all [T, D] fp32, weight: [D]
        fp32. out may be x.
        """
        ...

    def rope(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        """Rotate q and k in place, first half of a head against its second half.

        q: [T, Hq, D] fp32, k: [T, Hk, D] fp32, both may be column slices of one qkv tensor: their
        last two dimensions are dense, the rows are strided. positions: [T] int32 in [0, P).
        cos_sin: [P, D] fp32, a row is cos[D/2], sin[D/2].
        """
        ...

    def silu_mul(self, out: Tensor, gate_up: Tensor) -> None:
        """`out = silu(gate) * up`; out: [T, F] fp32, gate_up: [T, 2F] fp32, a row is gate[F],
        up[F].
        """
        ...

    def write_kv(
        self, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor
    ) -> None:
        """Round k and v (nearest even) into their slots.

        k_cache, v_cache: [num_blocks, Hk, block_size, D] model dtype, strided over blocks, dense
        inside a block (one layer's views of the pool), or int8 with D + KV_SCALE_BYTES: each row of
        D is rounded to integers with a scale of its own (`narrow.round_rows`, 8 bits). Where an
        element of a head's piece of a block lies is the backend's (equal on all its levels); 16
        tokens from a multiple of 16 on are one piece of it. k, v: [T, Hk, D] fp32, rows may be
        strided.
        slot_mapping: [T] int32, block * block_size + offset; -1 skips the row; no slot twice.
        """
        ...

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
        """Causal attention over the paged pool, prefill chunks and decode rows in one call.

        out: [T, Hq, D] fp32 contiguous; q: [T, Hq, D] fp32, rows may be strided; k_cache, v_cache
        as in `write_kv`.
        qo_indptr: [S+1] int32, rows of sequence s are [qo_indptr[s], qo_indptr[s+1]): its last
        positions of kv_len[s].
        kv_indptr: [S+1] int32 into kv_indices: [nnz] int32, the blocks of s in order (at least
        ceil(kv_len / block_size)).
        kv_len: [S] int32, tokens of s in the pool, this step's included (their KV is already
        written).
        window > 0: a query at position p sees keys [p - window + 1, p]; window <= 0: all of [0, p].
        A slot that no query may see is never read into a result, whatever it holds.
        """
        ...

    def fuse_decoder(self, parts: DecoderParts) -> FusedDecoder | None:
        """This decoder as one object, or None where this backend has single calls only."""
        ...

    def argmax_logprob(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The greedy choice of each row of logits ([R, V] fp32): ids [R] int32 and their logprobs
        [R] fp32.

        The first maximum wins; logprob = max - logsumexp. A row with a NaN or without a finite
        maximum has id -1, NaN.
        """
        ...

    def draw(
        self,
        weights: NDArray[np.float64],
        spans: NDArray[np.float64],
        keys: NDArray[np.uint64],
    ) -> list[int]:
        """One token of each row, drawn by the random number of its key (philox.py): the first, by
        id, up to which more than that number of the row's whole weight lies.

        weights: [R, V], not negative, not all 0. spans: [R, V / DRAW_SPAN, rounded up], the weight
        up to the end of each DRAW_SPAN tokens. keys: [R, 3], seed, choice and position. Every
        backend gives the same tokens.
        """
        ...

    def draw_plain(
        self,
        logits: Tensor,
        index: NDArray[np.int32],
        temperatures: NDArray[np.float64],
        keys: NDArray[np.uint64],
    ) -> list[int]:
        """One token of each row `index[r]` of logits ([any, V] fp32) at its temperature above 0: as
        `draw` would from weights `exp((logits - largest) / temperature)` in float64; -1 where it
        takes those to know, or the largest is not finite. temperatures: [R, 1]; keys: [R, 3].
        """
        ...

    def log_softmax(self, out: Tensor, logits: Tensor) -> None:
        """`out = logits - logsumexp(logits)` per row; both [R, V] fp32. -inf stays -inf.

        A row with a NaN or without a finite maximum becomes NaN throughout. The value at the argmax
        equals `argmax_logprob`'s bit for bit.
        """
        ...
