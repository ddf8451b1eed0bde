"""The decoder: token ids to hidden states to logits, over the kernels and the paged pool.

Owns the hidden states and logits of one rank (grown to the largest step seen, never shrunk).
Invariant: a row's result depends on its own sequence only, so any batch, any chunking and any
number of ranks give the same bits.
"""

from typing import Final

import torch
from torch import Tensor

from diptych.engine.batch import ModelInput
from diptych.engine.collectives import Collectives, Solo
from diptych.engine.core.model_config import ModelConfig
from diptych.engine.models.layers import Layers, SingleCalls, fused_decoder
from diptych.engine.models.weights import DecoderWeights
from diptych.engine.pool import KVPool
from diptych.kernels import DecodeRows, Kernels

__all__ = ["Decoder"]

_ROWS_MIN: Final = 16  # rows of the smallest buffer


class Decoder:
    """One rank's decoder. `forward` writes the KV of the step and of its shards into the pool."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        kernels: Kernels,
        pool: KVPool,
        ranks: Collectives | None = None,
        *,
        pulse: Tensor | None = None,
        fuse: bool = True,
    ) -> None:
        """ranks: None where this rank computes all shards. pulse: [1] int64, grows with each layer.
        fuse: let the backend compute whole layers and steps in one call where it can; changes no
        bit.
        """
        self._config = config
        self._weights = weights
        self._kernels = kernels
        self._ranks: Collectives = Solo(len(weights.shards)) if ranks is None else ranks
        self._whole = len(weights.shards) == 1  # nothing is put together
        self._fused = fused_decoder(config, weights, kernels, pool, pulse) if fuse else None
        self._layers: Layers = self._fused or SingleCalls(
            config, weights, kernels, pool, self._ranks, pulse
        )
        self._residual = torch.empty(_ROWS_MIN, config.hidden_size, dtype=torch.float32)
        self._logits = torch.empty(1, config.vocab_size, dtype=torch.float32)
        self._logits_view = self._logits

    @property
    def decodes(self) -> bool:
        """Whether there is `decode`."""
        return self._fused is not None

    def decode(self, rows: DecodeRows, *, choose: bool) -> Tensor | None:
        """A whole step of one token for each sequence: the logits, [R, vocab] fp32, valid until the
        next call; choose: and the greedy choice in `rows`. None, with nothing done: a row has not
        all the blocks that it needs.
        """
        assert self._fused is not None
        logits = self._logits_of(rows.num_rows)
        return logits if self._fused.decode(rows, logits, choose=choose) else None

    def forward(self, inputs: ModelInput, outputs: Tensor | None = None) -> Tensor:
        """Hidden states before the last norm, [T, hidden] fp32; valid until the next call.

        outputs: [n] int32, the sequences, ascending, of which the last row is all that is needed;
        the other rows are undefined then. Most of the last layer is left out for them.
        """
        rows, capacity = inputs.ids.shape[0], self._residual.shape[0]
        if rows > capacity:
            self._residual = torch.empty(max(rows, 2 * capacity), self._config.hidden_size)
        residual = self._residual[:rows]
        self._embed(residual, inputs.ids)
        self._layers.run_layers(residual, inputs, outputs)
        return residual

    def _embed(self, out: Tensor, ids: Tensor) -> None:
        """out: [T, hidden]; ids: [T]."""
        table, head = self._weights.embedding, self._weights.lm_head
        if table is not None:
            self._kernels.embedding(out, table, ids)
        elif self._whole:
            self._kernels.embedding(out, head[0], ids)
        else:  # each token is a row of one shard's head
            for shard, packed in zip(self._weights.shards, head, strict=True):
                inside = (ids >= shard.vocab.start) & (ids < shard.vocab.stop)
                mine = inside.nonzero().flatten()  # [t] rows of out
                if mine.numel():
                    rows = torch.empty(mine.numel(), out.shape[1], dtype=torch.float32)
                    self._kernels.embedding(rows, packed, ids[mine] - shard.vocab.start)
                    out.index_copy_(0, mine, rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, vocab] fp32 of hidden states [R, hidden] (overwritten); valid until the next call.

        Every rank computes its part of the vocabulary; only rank 0 has the whole.
        """
        rows, weights = hidden.shape[0], self._weights
        logits = self._logits_of(rows)
        self._kernels.rms_norm(hidden, hidden, weights.norm, self._config.rms_norm_eps)
        if self._whole:
            self._kernels.linear(logits, hidden, weights.lm_head[0])
            return logits
        widest = max(len(shard.vocab) for shard in weights.shards)
        parts = self._ranks.parts(rows * widest)
        for part, index in zip(parts, self._ranks.shards, strict=True):
            columns = len(weights.shards[index].vocab)
            out = part[: rows * columns].view(rows, columns)
            self._kernels.linear(out, hidden, weights.lm_head[index])
        collected = self._ranks.collect()
        if collected is not None:
            for part, shard in zip(collected, weights.shards, strict=True):
                columns = part[: rows * len(shard.vocab)].view(rows, -1)
                logits[:, shard.vocab.start : shard.vocab.stop] = columns
        return logits

    def _logits_of(self, rows: int) -> Tensor:
        """The first rows of the buffer; decode steps of one batch size follow each other."""
        if rows != len(self._logits_view):
            if rows > len(self._logits):
                self._logits = torch.empty(rows, self._config.vocab_size, dtype=torch.float32)
            self._logits_view = self._logits[:rows]
        return self._logits_view
