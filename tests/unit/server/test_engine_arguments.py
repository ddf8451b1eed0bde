"""`Engine`'s arguments mean what the CLI's flags of their names mean."""

import argparse
import inspect
from pathlib import Path

import pytest

from diptych.engine.core.config import EngineOptions, ModelOptions
from diptych.engine.core.errors import ConfigError
from diptych.server.engine import Engine
from diptych.server.engine_arguments import EngineArguments, MoreArguments
from diptych.server.engine_flags import add_engine_arguments, engine_options

FLAGS: dict[str, tuple[list[str], object]] = {
    "prefill": (["--prefill", "2", "--decode", "1"], 2),
    "decode": (["--decode", "2", "--prefill", "1"], 2),
    "mixed": (["--mixed", "1"], 1),
    "dtype": (["--dtype", "float16"], "float16"),
    "max_model_len": (["--max-model-len", "99"], 99),
    "load_format": (["--load-format", "dummy"], "dummy"),
    "quantization": (["--quantization", "int8"], "int8"),
    "block_size": (["--block-size", "48"], 48),
    "num_blocks": (["--num-gpu-blocks-override", "77"], 77),
    "kv_cache_memory_bytes": (["--kv-cache-memory-bytes", "4M"], 4 << 20),
    "kv_cache_dtype": (["--kv-cache-dtype", "int8"], "int8"),
    "enable_prefix_caching": (["--no-enable-prefix-caching"], False),
    "transfer": (["--transfer", "tcp"], "tcp"),
    "max_num_seqs": (["--max-num-seqs", "3"], 3),
    "max_num_batched_tokens": (["--max-num-batched-tokens", "64"], 64),
    "max_chunk_tokens": (["--long-prefill-token-threshold", "32"], 32),
    "prefill_batch_tokens": (["--prefill-batch-tokens", "96"], 96),
    "ttft_slo_s": (["--ttft-slo", "0.5s"], 0.5),
    "itl_slo_s": (["--itl-slo", "50ms"], 0.05),
    "autoscale": (["--autoscale", "1:4"], (1, 4)),
    "scale_down_delay_s": (["--scale-down-delay", "5"], 5.0),
    "tensor_parallel_size": (["--tensor-parallel-size", "2"], 2),
    "prefill_tp": (["--prefill-tp", "2"], 2),
    "decode_tp": (["--decode-tp", "2"], 2),
    "threads": (["--threads", "1"], 1),
    "prefill_block_size": (["--prefill-block-size", "32"], 32),
    "decode_block_size": (["--decode-block-size", "64"], 64),
    "prefill_kv_cache_dtype": (["--prefill-kv-cache-dtype", "bfloat16"], "bfloat16"),
    "decode_kv_cache_dtype": (["--decode-kv-cache-dtype", "float32"], "float32"),
    "packed_cache": (["--packed-cache", "/somewhere"], Path("/somewhere")),
    "kernels": (["--kernels", "reference"], "reference"),
    "kernel_level": (["--kernel-level", "avx2"], "avx2"),
    "cpu_cores": (["--cpu-cores", "0-1"], "0-1"),
    "prefill_core_share": (["--prefill-core-share", "70"], 70),
    "rank_link": (["--rank-link", "gloo"], "gloo"),
    "hang_timeout_s": (["--hang-timeout", "7"], 7.0),
}


BESIDE: dict[str, dict[str, object]] = {"mixed": {"prefill": 0, "decode": 0}}
"""What else a flag says."""


def by_flags(*words: str) -> EngineOptions:
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    return engine_options(parser.parse_args(["--separate-pools", *words]), "/model")


def by_arguments(**given: object) -> EngineOptions:
    arguments = {"separate_pools": True, "max_waiting": 1024, **given}
    return EngineArguments(**arguments).options("/model")  # type: ignore[arg-type]  # by name


def test_every_argument_is_tried() -> None:
    assert {*FLAGS, "max_waiting", "separate_pools"} == {*EngineArguments.__struct_fields__}
    assert FLAGS.keys() >= MoreArguments.__annotations__.keys()


@pytest.mark.parametrize("name", FLAGS)
def test_an_argument_is_its_flag(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIPTYCH_KERNEL_LEVEL", raising=False)
    words, value = FLAGS[name]
    flagged, beside = by_flags(*words), BESIDE.get(name, {})
    assert flagged != by_flags()
    assert by_arguments(**{name: value}, **beside) == flagged


def test_nothing_given_is_what_the_options_say() -> None:
    wanted = EngineOptions(model=ModelOptions(path="/model"))
    assert EngineArguments(max_waiting=1024).options("/model") == wanted


def test_every_argument_of_the_engine_is_one() -> None:
    """And has the same default."""
    for name, parameter in inspect.signature(Engine.__init__).parameters.items():
        if name in ("self", "model", "inline", "chat_template", "more"):
            continue
        assert parameter.default == getattr(EngineArguments(), name), name
        assert name not in MoreArguments.__annotations__


def test_another_name_is_an_error() -> None:
    with pytest.raises(TypeError, match="decode_blok_size"):
        EngineArguments(decode_blok_size=1)  # type: ignore[call-arg]


def test_another_load_format_is_an_error() -> None:
    with pytest.raises(ConfigError, match="load_format must be"):
        EngineArguments(load_format="gguf").options("/model")
