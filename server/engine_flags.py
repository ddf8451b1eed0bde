"""The flags that describe an engine, shared by every command that starts one.

Owns the mapping from flags to `EngineArguments`. Names are vLLM's where the meaning is the same.
"""

import argparse
import os
import re
from typing import Final, get_args

from diptych.engine.core.config import (
    ITL_SLO_S,
    TTFT_SLO_S,
    EngineOptions,
    KVCacheDtype,
    Quantization,
    Transfer,
)
from diptych.engine.core.errors import ConfigError
from diptych.server.engine_arguments import EngineArguments

_UNITS: Final = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str) -> int:
    """ "512M", "4GiB", "1e9": bytes. Raises argparse.ArgumentTypeError."""
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"not a size: {text!r} (say 512M or 4G)")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_seconds(text: str) -> float:
    """ "200", "200ms", "0.2s": seconds; a bare number is milliseconds, as in vLLM's goodput."""
    match = re.fullmatch(r"([0-9.]+)\s*(ms|s)?", text.strip())
    try:
        value = float(match[1]) if match is not None else -1.0
    except ValueError:
        value = -1.0
    if match is None or value <= 0.0:
        raise argparse.ArgumentTypeError(f"not a time: {text!r} (say 200, 200ms or 0.2s)")
    return value if match[2] == "s" else value / 1e3


def parse_kv_dtype(text: str) -> str:
    """A dtype, also by its short name."""
    return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(text, text)


def parse_range(text: str) -> tuple[int, int]:
    """ "0:4": fewest and most. Raises argparse.ArgumentTypeError."""
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if match is None or not int(match[1]) <= int(match[2]) >= 1:
        raise argparse.ArgumentTypeError(f"not a range: {text!r} (say 0:4, with 4 at least 1)")
    return int(match[1]), int(match[2])


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model").add_argument
    model("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    model("--max-model-len", type=int, help="tokens of prompt and answer (default: the model's)")
    model(
        "--quantization",
        choices=get_args(Quantization),
        help="round the layers' weights at load, w8a8 and w4a8 also activations per token (default:"
        " no; int4 is int4-g64)",
    )
    model("--load-format", choices=["auto", "dummy"], default="auto", help="dummy: random weights")

    model(
        "--packed-cache",
        metavar="DIR",
        help="keep packed weights in this folder, and map them at the next start",
    )
    _add_worker_arguments(parser)
    _add_memory_arguments(parser)
    _add_rank_arguments(parser)
    _add_scheduling_arguments(parser)


def _add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    memory = parser.add_argument_group("KV memory").add_argument
    memory("--block-size", type=int, default=16, help="tokens of a block (default: %(default)s)")
    memory("--kv-cache-memory-bytes", type=parse_bytes, default=1 << 30, metavar="SIZE")
    memory("--num-gpu-blocks-override", type=int, metavar="N", help="blocks of the pool, exactly")
    memory(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="reuse the KV of shared prefixes (default: on)",
    )
    memory(
        "--separate-pools",
        action="store_true",
        help="prefill, decode and mixed workers each have a memory of their own, of the size above",
    )
    memory(
        "--kv-cache-dtype",
        type=parse_kv_dtype,
        choices=get_args(KVCacheDtype),
        default="auto",
        help="dtype of the KV pools, also bf16, fp16, fp32; int8 holds about twice the tokens of"
        " bf16 in the same memory (auto: the model's)",
    )
    for side in ("prefill", "decode"):
        memory(
            f"--{side}-block-size",
            type=int,
            metavar="N",
            help=f"tokens of a block in the {side} pool, with --separate-pools",
        )
        memory(
            f"--{side}-kv-cache-dtype",
            type=parse_kv_dtype,
            choices=get_args(KVCacheDtype),
            default="auto",
            help=f"dtype of the {side} pool, with --separate-pools (auto: --kv-cache-dtype)",
        )
    memory(
        "--transfer",
        choices=get_args(Transfer),
        default="auto",
        help="how KV moves between separate pools (auto: shared memory on one host)",
    )


def _add_scheduling_arguments(parser: argparse.ArgumentParser) -> None:
    scheduling = parser.add_argument_group("scheduling").add_argument
    scheduling("--max-num-seqs", type=int, default=256, help="sequences on one worker")
    scheduling("--max-num-batched-tokens", type=int, default=512, help="tokens of one step")
    scheduling("--long-prefill-token-threshold", type=int, metavar="N", help="cap of one chunk")
    scheduling(
        "--prefill-batch-tokens",
        type=int,
        metavar="N",
        help="prompts share a step up to here (default: fitted to what steps cost); more of them "
        "would only wait for each other",
    )
    scheduling("--max-num-queued-reqs", type=int, default=1024, help="waiting before 429")
    scheduling("--hang-timeout", type=float, default=3.0, help="seconds until a hang is fenced")


def _add_rank_arguments(parser: argparse.ArgumentParser) -> None:
    ranks = parser.add_argument_group("tensor parallelism").add_argument
    ranks(
        "--tensor-parallel-size",
        "-tp",
        type=int,
        default=1,
        metavar="N",
        help="spread each worker's model over N processes (default: 1)",
    )
    ranks("--prefill-tp", type=int, metavar="N", help="the same of prefill workers only")
    ranks("--decode-tp", type=int, metavar="N", help="the same of decode workers only")
    ranks(
        "--rank-link",
        choices=["auto", "shm", "gloo"],
        default="auto",
        help="how the processes of one worker exchange data (auto: shared memory)",
    )


def _add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    workers = parser.add_argument_group("workers").add_argument
    workers("--prefill", type=int, metavar="N", help="prefill workers (default: 1)")
    workers("--decode", type=int, metavar="N", help="decode workers (default: 1)")
    workers("--mixed", type=int, metavar="N", help="workers that do both, instead or beside")
    workers(
        "--ttft-slo",
        type=parse_seconds,
        metavar="TIME",
        help="target to the first token, 500 or 500ms or 0.5s: with a target, workers move between"
        f" prefill and decode as load asks (default: roles are fixed; {TTFT_SLO_S:g}s beside"
        " --itl-slo)",
    )
    workers(
        "--itl-slo",
        type=parse_seconds,
        metavar="TIME",
        help=f"target between tokens (default: none; {ITL_SLO_S:g}s beside --ttft-slo)",
    )
    workers(
        "--autoscale",
        type=parse_range,
        metavar="MIN:MAX",
        help="run MIN to MAX workers as load asks; with MIN 0 the last one goes too, weights and"
        " all, and comes back with the next request; with --ray, Ray is asked for each and given"
        " it back",
    )
    workers(
        "--scale-down-delay",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds for which fewer workers must have been enough (default: %(default)s)",
    )
    workers("--threads", type=int, help="threads of one process at most")
    workers("--cpu-cores", metavar="CORES", help="of all workers: a count, or a list as 0-3,8")
    workers(
        "--prefill-core-share",
        type=int,
        default=50,
        metavar="PERCENT",
        help="cores for prefill while decode is busy too (default: %(default)s)",
    )
    workers("--kernels", choices=["auto", "cpp", "reference"], default="auto")
    workers("--kernel-level", help="plain, avx2, avx512, avx512_bf16 or amx (default: the best)")


def engine_options(
    args: argparse.Namespace,
    model_path: str,
    *,
    several_hosts: bool = False,
    elastic_hosts: bool = False,
) -> EngineOptions:
    """Raises ConfigError for combinations that cannot work."""
    split = args.prefill is None and args.decode is None and not args.mixed
    single = args.autoscale is not None and args.autoscale[1] == 1  # then one does both
    if min(args.max_num_seqs, args.max_num_batched_tokens, args.max_num_queued_reqs) < 1:
        raise ConfigError("limits of sequences, tokens and queued requests must be at least 1")
    options = EngineArguments(
        prefill=int(not single) if split else args.prefill or 0,
        decode=int(not single) if split else args.decode or 0,
        mixed=int(single) if split else args.mixed or 0,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        load_format=args.load_format,
        quantization=args.quantization,
        packed_cache=args.packed_cache,
        kernels=args.kernels,
        kernel_level=args.kernel_level or os.environ.get("DIPTYCH_KERNEL_LEVEL"),
        block_size=args.block_size,
        num_blocks=args.num_gpu_blocks_override,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        kv_cache_dtype=args.kv_cache_dtype,
        enable_prefix_caching=args.enable_prefix_caching,
        separate_pools=args.separate_pools,
        prefill_block_size=args.prefill_block_size,
        decode_block_size=args.decode_block_size,
        prefill_kv_cache_dtype=args.prefill_kv_cache_dtype,
        decode_kv_cache_dtype=args.decode_kv_cache_dtype,
        transfer=args.transfer,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_chunk_tokens=args.long_prefill_token_threshold,
        prefill_batch_tokens=args.prefill_batch_tokens,
        max_waiting=args.max_num_queued_reqs,
        ttft_slo_s=args.ttft_slo,
        itl_slo_s=args.itl_slo,
        autoscale=args.autoscale,
        scale_down_delay_s=args.scale_down_delay,
        tensor_parallel_size=args.tensor_parallel_size,
        prefill_tp=args.prefill_tp,
        decode_tp=args.decode_tp,
        rank_link=args.rank_link,
        threads=args.threads,
        cpu_cores=args.cpu_cores,
        prefill_core_share=args.prefill_core_share,
        hang_timeout_s=args.hang_timeout,
    ).options(model_path, several_hosts=several_hosts, elastic_hosts=elastic_hosts)
    options.verify()
    return options
