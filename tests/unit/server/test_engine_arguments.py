"""`Engine`'s further arguments mean what the CLI's flags of their names mean."""

import argparse
from pathlib import Path

import pytest

from diptych.engine.core.config import EngineOptions, ModelOptions
from diptych.server.engine_arguments import MoreArguments, with_more
from diptych.server.engine_flags import add_engine_arguments, engine_options

FLAGS: dict[str, tuple[list[str], object]] = {
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


def by_flags(*words: str) -> EngineOptions:
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    return engine_options(parser.parse_args(["--separate-pools", *words]), "/model")


def test_every_argument_is_tried() -> None:
    assert FLAGS.keys() == MoreArguments.__annotations__.keys()


@pytest.mark.parametrize("name", FLAGS)
def test_an_argument_is_its_flag(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIPTYCH_KERNEL_LEVEL", raising=False)
    words, value = FLAGS[name]
    plain, flagged = by_flags(), by_flags(*words)
    assert flagged != plain
    assert with_more(plain, {name: value}) == flagged  # type: ignore[misc]


def test_nothing_given_changes_nothing() -> None:
    options = EngineOptions(model=ModelOptions(path="/model"))
    assert with_more(options, {}) == options


def test_another_name_is_an_error() -> None:
    with pytest.raises(TypeError, match="decode_blok_size"):
        with_more(by_flags(), {"decode_blok_size": 1})  # type: ignore[typeddict-unknown-key]
