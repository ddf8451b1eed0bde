"""One worker's steps: plan in, samples and logprobs out.

`LoadedModel` owns the packed weights; a warm parent loads it once and forks the workers, which
share its pages. `Runner` owns one worker's buffers and sampler. Invariant: results are a pure
function of (fingerprint, the rows' own sequences), never of the batch, the chunking or the pool.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Final, Literal, Protocol, cast

import msgspec
import torch
from torch import Tensor

from diptych import kernels as backends
from diptych.engine.batch import build_input
from diptych.engine.core.config import ModelOptions
from diptych.engine.core.errors import ConfigError
from diptych.engine.core.model_config import ModelConfig, load_model_config
from diptych.engine.core.plan import Sample, StepPlan, StepResult, StepRow, TokenLogprobs
from diptych.engine.core.request import Sequence
from diptych.engine.loader import open_weights
from diptych.engine.logprobs import token_logprobs
from diptych.engine.models.decoder import Decoder
from diptych.engine.models.weights import DecoderWeights, pack_weights
from diptych.engine.pool import KVPool
from diptych.engine.sampling import Sampler
from diptych.kernels import Kernels

__all__ = ["CoreShare", "LoadedModel", "Runner", "load_model", "make_runner"]

_LOGITS_BYTES_MAX: Final = 64 << 20  # logits are made in slices of at most this


class RowSampler(Protocol):
    """What the runner asks of a sampler (engine/sampling.py)."""

    def sample(self, logits: Tensor, seqs: Seq[Sequence]) -> list[Sample]:
        """logits: [R, V] fp32, may be overwritten; one sample per row."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    config: ModelConfig
    weights: DecoderWeights
    kernels: Kernels
    fingerprint: str  # equal fingerprints compute equal bits


def load_model(options: ModelOptions, num_shards: int = 1) -> LoadedModel:
    """Loads and packs the weights, in as many shards. Raises ModelLoadError or ConfigError.

    Fork-safe as long as torch runs on one thread (a process that forks calls
    `torch.set_num_threads(1)` first): the kernels' own threads are made by `make_runner`.
    """
    config = load_model_config(options.path, options.dtype, options.max_model_len)
    kernels = load_kernels(options)
    source = open_weights(Path(options.path), config, options.load_format, options.seed)
    digest = sha256(source.identity().encode())
    digest.update(_numerics(config))
    digest.update(f"tp={num_shards} kv={config.dtype} {kernels.fingerprint()}".encode())
    narrow: backends.Narrow | None = None
    if options.quantization is not None:
        narrow = backends.NARROW.get(options.quantization)
        if narrow is None:
            known = ", ".join(backends.NARROW)
            raise ConfigError(f"quantization must be {known}, got {options.quantization!r}")
        digest.update(f" {narrow}".encode())
    weights = pack_weights(config, source, kernels, narrow, num_shards)
    return LoadedModel(config, weights, kernels, digest.hexdigest())


def load_kernels(options: ModelOptions) -> Kernels:
    """The backend that the options name, single-threaded."""
    if options.kernels not in ("auto", "cpp", "reference"):
        raise ConfigError(f"kernels must be auto, cpp or reference, got {options.kernels!r}")
    name = cast(Literal["auto", "cpp", "reference"], options.kernels)
    try:
        return backends.load(name, options.kernel_level, 1)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"kernels {name!r} cannot be used: {error}") from error


def _numerics(config: ModelConfig) -> bytes:
    """The part of the configuration that decides bits; limits and defaults do not."""
    fields = msgspec.to_builtins(config)
    for name in ("max_model_len", "bos_token_id", "eos_token_ids", "sampling_defaults"):
        del fields[name]
    return msgspec.json.encode(fields, order="sorted")


@dataclass(frozen=True, slots=True, eq=False)
class CoreShare:
    """A worker's part in its host's cores (transfer/core_table.py)."""

    table: memoryview  # [workers] bytes of shared memory, mapped for the life of the process
    slot: int
    cores: list[int]
    prefill_share: int  # percent


def make_runner(
    model: LoadedModel, pool: KVPool, threads: int, share: CoreShare | None = None
) -> "Runner":
    """A runner of this process with at most `threads` threads; call it after a fork, not before.

    Without a share the threads are anywhere.
    """
    model.kernels.set_num_threads(threads)
    if share is not None:
        table = torch.frombuffer(share.table, dtype=torch.uint8)
        model.kernels.share_cores(table, share.slot, share.cores, share.prefill_share)
    config = model.config
    sampler = Sampler(model.kernels, config.vocab_size, config.eos_token_ids)
    return Runner(model, pool, sampler)


class Runner:
    """Runs steps over one pool. Not for two threads at once."""

    def __init__(self, model: LoadedModel, pool: KVPool, sampler: RowSampler) -> None:
        self.fingerprint: str = model.fingerprint
        self._kernels = model.kernels
        self._block_size = pool.block_size
        self._decoder = Decoder(model.config, model.weights, model.kernels, pool)
        self._sampler = sampler
        self._slice = max(1, _LOGITS_BYTES_MAX // (4 * model.config.vocab_size))  # rows

    def run(self, plan: StepPlan, on_layer: Callable[[], None] | None = None) -> StepResult:
        """One forward pass; `on_layer` is called after each layer, to show that time goes on.

        An exception of `on_layer` ends the step; the KV of its rows is then undefined.
        """
        if plan.empty:
            return StepResult([])
        started = perf_counter()
        hidden = self._decoder.forward(build_input(plan, self._block_size), on_layer)
        result = StepResult(self._sample(plan.rows, hidden))
        end = 0
        for index, row in enumerate(plan.rows):
            end += row.length
            if row.seq.want_prompt_logprobs:
                entries = self._prompt_logprobs(row, hidden[end - row.length : end])
                result.prompt_logprobs[index] = entries
        result.compute_s = perf_counter() - started
        return result

    def _sample(self, rows: list[StepRow], hidden: Tensor) -> list[Sample | None]:
        """One sample per row that asks; hidden: [T, hidden], not changed."""
        samples: list[Sample | None] = [None] * len(rows)
        wanted: list[int] = []  # indices of rows
        last: list[int] = []  # their last token's row of hidden
        end = 0
        for index, row in enumerate(rows):
            end += row.length
            if row.sample:
                wanted.append(index)
                last.append(end - 1)
        for start in range(0, len(wanted), self._slice):
            picked = wanted[start : start + self._slice]
            chosen = torch.tensor(last[start : start + self._slice], dtype=torch.int32)
            logits = self._decoder.logits(hidden.index_select(0, chosen))
            sampled = self._sampler.sample(logits, [rows[index].seq for index in picked])
            assert len(sampled) == len(picked), "the sampler lost a row"
            for index, sample in zip(picked, sampled, strict=True):
                samples[index] = sample
        return samples

    def _prompt_logprobs(self, row: StepRow, hidden: Tensor) -> list[TokenLogprobs]:
        """Entries for the prompt positions after the row's tokens; hidden: [length, hidden]."""
        seq = row.seq
        top_k = seq.request.params.prompt_logprobs or 0
        end = min(
            row.start + row.length, seq.num_prompt - 1
        )  # its logits say the last prompt token
        entries: list[TokenLogprobs] = []
        for start in range(row.start, end, self._slice):
            stop = min(start + self._slice, end)
            rows = hidden[start - row.start : stop - row.start].clone()
            targets = seq.tokens[start + 1 : stop + 1]
            entries += token_logprobs(self._kernels, self._decoder.logits(rows), targets, top_k)
        return entries
