"""One worker's steps: plan in, samples and logprobs out.

`LoadedModel` owns the packed weights; a warm parent loads it once and forks the workers, which
share its pages. `Runner` owns one worker's buffers and sampler. Invariant: results are a pure
function of (fingerprint, the rows' own sequences), never of the batch, the chunking or the pool.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from hashlib import sha256
from time import perf_counter
from typing import Final, Literal, NoReturn, Protocol, cast

import msgspec
import torch
from torch import Tensor

from diptych import kernels as backends
from diptych.engine.batch import build_input
from diptych.engine.collectives import Collectives
from diptych.engine.core.config import ModelOptions
from diptych.engine.core.errors import ConfigError
from diptych.engine.core.model_config import KVDtype, ModelConfig, load_model_config
from diptych.engine.core.plan import Sample, StepPlan, StepResult, StepRow, TokenLogprobs
from diptych.engine.core.request import Sequence
from diptych.engine.decode_batch import DecodeBatch
from diptych.engine.follower import encode_step, follow
from diptych.engine.head_calls import head_calls, outputs
from diptych.engine.logprobs import token_logprobs
from diptych.engine.models.decoder import Decoder
from diptych.engine.models.weights import DecoderWeights
from diptych.engine.packed_file import PackedKey
from diptych.engine.packing import Prepared, Progress, packed_quantization, prepare_weights
from diptych.engine.pool import KVPool
from diptych.engine.sampling import Sampler, best_samples
from diptych.engine.weights_tree import SHAPE_VERSION
from diptych.kernels import Kernels

__all__ = [
    "CoreShare",
    "LoadedModel",
    "Runner",
    "exchange_floats_max",
    "follow_steps",
    "load_model",
    "make_runner",
]

_LOGITS_BYTES_MAX: Final = 64 << 20  # logits are made in slices of at most this


class RowSampler(Protocol):
    """What the runner asks of a sampler (engine/sampling.py)."""

    def takes_best(self, seqs: Seq[Sequence]) -> bool:
        """Whether each of these takes the best token now, and asks for nothing else."""
        ...

    def sample(self, logits: Tensor, seqs: Seq[Sequence]) -> list[Sample]:
        """logits: [R, V] fp32, may be overwritten; one sample per row. The same list as in the last
        call means the same sequences, at most longer ones; so in `takes_best`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    config: ModelConfig
    weights: DecoderWeights
    kernels: Kernels
    fingerprint: str  # equal fingerprints compute equal bits
    prepared: Prepared  # how the weights came here

    def fingerprint_over(self, kv_dtypes: Seq[KVDtype]) -> str:
        """Of results over pools of these dtypes, which it names where they are not the model's."""
        if all(dtype == self.config.dtype for dtype in kv_dtypes):
            return self.fingerprint
        names = kv_dtypes[:1] if len(set(kv_dtypes)) == 1 else kv_dtypes
        return f"{self.fingerprint} kv {' '.join(names)}"


def load_model(
    options: ModelOptions,
    num_shards: int = 1,
    *,
    threads: int = 1,
    on_progress: Progress | None = None,
) -> LoadedModel:
    """Loads and packs the weights, in as many shards, or maps packed ones. Raises ModelLoadError or
    ConfigError.

    Packing takes `threads` threads, which are gone at the end. Fork-safe as long as torch runs on
    one thread (a process that forks calls `torch.set_num_threads(1)` first).
    """
    config = load_model_config(options.path, options.dtype, options.max_model_len)
    kernels = load_kernels(options)
    quantization = options.quantization or packed_quantization(options)
    narrow: backends.Narrow | None = None
    if quantization is not None:
        narrow = backends.NARROW.get(quantization)
        if narrow is None:
            known = ", ".join(backends.NARROW)
            raise ConfigError(f"quantization must be {known}, got {quantization!r}")
    key = PackedKey(
        shape_version=SHAPE_VERSION,
        kernels=kernels.fingerprint(),
        numerics=sha256(_numerics(config)).hexdigest(),
        dtype=config.dtype,
        quantization=quantization,
        num_shards=num_shards,
    )
    kernels.set_num_threads(threads)
    try:
        prepared = prepare_weights(options, config, kernels, key, narrow, on_progress)
    finally:
        kernels.set_num_threads(1)
    digest = sha256(prepared.identity.encode())
    digest.update(_numerics(config))
    digest.update(f"tp={num_shards} kv={config.dtype} {kernels.fingerprint()}".encode())
    if narrow is not None:
        digest.update(f" {narrow}".encode())
    return LoadedModel(config, prepared.weights, kernels, digest.hexdigest(), prepared)


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
    """A rank's part in its host's cores (transfer/core_table.py)."""

    table: memoryview  # [ranks] bytes of shared memory, mapped for the life of the process
    slot: int
    cores: list[int]
    prefill_share: int  # percent


def make_runner(
    model: LoadedModel,
    pool: KVPool,
    threads: int,
    share: CoreShare | None = None,
    ranks: Collectives | None = None,
    pulse: memoryview | None = None,
) -> "Runner":
    """A runner of this process with at most `threads` threads; call it after a fork, not before.

    Without a share the threads are anywhere. ranks: None where this process computes all shards.
    pulse: as in `Runner`.
    """
    _set_threads(model, threads, share)
    config = model.config
    sampler = Sampler(model.kernels, config.vocab_size, config.eos_token_ids)
    return Runner(model, pool, sampler, ranks, pulse)


def _set_threads(model: LoadedModel, threads: int, share: CoreShare | None) -> None:
    model.kernels.set_num_threads(threads)
    if share is not None:
        table = torch.frombuffer(share.table, dtype=torch.uint8)
        model.kernels.share_cores(table, share.slot, share.cores, share.prefill_share)


def follow_steps(
    model: LoadedModel, pool: KVPool, threads: int, share: CoreShare | None, ranks: Collectives
) -> NoReturn:
    """What a rank but the first does: it computes the steps of rank 0's runner."""
    _set_threads(model, threads, share)
    follow(Decoder(model.config, model.weights, model.kernels, pool, ranks), ranks)


def head_portion(config: ModelConfig) -> int:
    """Hidden states that go through the output head at once."""
    return max(1, _LOGITS_BYTES_MAX // (4 * config.vocab_size))


def exchange_floats_max(model: LoadedModel, tokens_max: int) -> int:
    """Floats of the ranks' largest exchange, in steps of at most `tokens_max` tokens."""
    config, shards = model.config, model.weights.shards
    widest = max(len(shard.vocab) for shard in shards)
    head = min(head_portion(config), tokens_max) * widest
    return len(shards) * max(tokens_max * config.hidden_size, head)


class Runner:
    """Runs steps over one pool, on rank 0 of a worker. Not for two threads at once."""

    def __init__(
        self,
        model: LoadedModel,
        pool: KVPool,
        sampler: RowSampler,
        ranks: Collectives | None = None,
        pulse: memoryview | None = None,
    ) -> None:
        """ranks: None where this process computes all shards. pulse: 8 bytes, an integer that grows
        with each layer, to show that time goes on.
        """
        self.fingerprint: str = model.fingerprint
        self._kernels = model.kernels
        self._block_size, self._num_parts = pool.block_size, pool.num_parts
        self._ranks = ranks
        self._decoder = Decoder(
            model.config,
            model.weights,
            model.kernels,
            pool,
            ranks,
            pulse=None if pulse is None else torch.frombuffer(pulse, dtype=torch.int64),
        )
        self._sampler = sampler
        self._portion = head_portion(model.config)
        self._batch = DecodeBatch(pool.num_parts)

    def run(self, plan: StepPlan) -> StepResult:
        """One forward pass."""
        if plan.empty:
            return StepResult([])
        started = perf_counter()
        # Ranks get the indices of a step, and large batches portions of logits: those go step by
        # step, as do prompts.
        decodes = len(plan.rows) == plan.num_decodes <= self._portion and self._ranks is None
        if decodes and self._decoder.decodes:
            result = StepResult(self._decode(plan.rows))
        else:
            result = self._run(plan)
        result.compute_s = perf_counter() - started
        return result

    def _decode(self, rows: list[StepRow]) -> list[Sample | None]:
        """A step of decodes only, in one call."""
        batch = self._batch
        batch.take(rows)
        takes_best = self._sampler.takes_best(batch.seqs)
        logits = self._decoder.decode(batch.rows, choose=takes_best)
        if logits is None:
            batch.read_tables()
            logits = self._decoder.decode(batch.rows, choose=takes_best)
            assert logits is not None, "a row beyond its blocks"
        if takes_best:
            return [*best_samples(batch.chosen())]
        samples = self._sampler.sample(logits, batch.seqs)
        assert len(samples) == len(rows), "the sampler lost a row"
        return [*samples]

    def _run(self, plan: StepPlan) -> StepResult:
        """Any step."""
        inputs = build_input(plan, self._block_size, self._num_parts)
        calls = head_calls(plan.rows, self._portion)
        if self._ranks is not None:
            self._ranks.share(encode_step(inputs, [call.hidden for call in calls]))
        hidden = self._decoder.forward(inputs, outputs(calls))
        result = StepResult([None] * len(plan.rows))
        for index, row in enumerate(plan.rows):
            if row.seq.want_prompt_logprobs:
                result.prompt_logprobs[index] = []
        for call in calls:
            logits = self._decoder.logits(hidden.index_select(0, call.hidden))
            if call.prompt is None:
                self._sample(plan.rows, call.rows, logits, result)
            else:
                entries = self._prompt_logprobs(plan.rows[call.rows[0]], call.prompt, logits)
                result.prompt_logprobs[call.rows[0]] += entries
        return result

    def _sample(
        self, rows: list[StepRow], picked: list[int], logits: Tensor, result: StepResult
    ) -> None:
        """One sample for each row of the plan in `picked`; logits: [R, V]."""
        sampled = self._sampler.sample(logits, [rows[index].seq for index in picked])
        assert len(sampled) == len(picked), "the sampler lost a row"
        for index, sample in zip(picked, sampled, strict=True):
            result.samples[index] = sample

    def _prompt_logprobs(
        self, row: StepRow, span: tuple[int, int], logits: Tensor
    ) -> list[TokenLogprobs]:
        """Entries for the prompt positions after the tokens [span), one per row of logits."""
        seq = row.seq
        targets = seq.tokens[span[0] + 1 : span[1] + 1]
        top_k = seq.request.params.prompt_logprobs or 0
        return token_logprobs(self._kernels, logits, targets, top_k)
