"""Flags of moving roles, of autoscaling and of KV dtypes."""

import argparse
from pathlib import Path

import pytest

from diptych.engine.core.config import EngineOptions
from diptych.engine.core.errors import ConfigError
from diptych.server.engine_flags import (
    add_engine_arguments,
    engine_options,
    parse_range,
    parse_seconds,
)
from tests.support.processes import write_tiny_model


def options_of(folder: Path, *flags: str) -> EngineOptions:
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    return engine_options(parser.parse_args(flags), str(write_tiny_model(folder)))


def test_times_are_milliseconds_unless_they_say_otherwise() -> None:
    assert parse_seconds("200") == parse_seconds("200ms") == parse_seconds("0.2s") == 0.2
    for text in ("", "0", "-1", "1m", "fast", "1..2"):
        with pytest.raises(argparse.ArgumentTypeError):
            parse_seconds(text)


def test_kv_dtypes_have_short_names(tmp_path: Path) -> None:
    assert options_of(tmp_path).cache.kv_cache_dtype == "auto"
    for text, dtype in (("bf16", "bfloat16"), ("fp32", "float32"), ("int8", "int8")):
        assert options_of(tmp_path, "--kv-cache-dtype", text).cache.kv_cache_dtype == dtype
    with pytest.raises(SystemExit):
        options_of(tmp_path, "--kv-cache-dtype", "int4")
    one_side = ("--separate-pools", "--decode-kv-cache-dtype", "int8")
    with pytest.raises(ConfigError, match="--kv-cache-dtype"):
        options_of(tmp_path, *one_side)
    options_of(tmp_path, *one_side, "--kv-cache-dtype", "int8")


def test_a_range_has_two_ends_in_order() -> None:
    assert parse_range("0:4") == (0, 4)
    for text in ("4", "4:2", "0:0", "-1:2", "a:b"):
        with pytest.raises(argparse.ArgumentTypeError):
            parse_range(text)


def test_without_a_target_nothing_moves(tmp_path: Path) -> None:
    options = options_of(tmp_path)
    assert not options.scheduler.steers
    assert options.batch.itl_slo_s is None


def test_one_target_brings_the_other(tmp_path: Path) -> None:
    options = options_of(tmp_path, "--ttft-slo", "500")
    assert options.scheduler.steers
    assert options.scheduler.slo_s == (0.5, 0.2)
    assert options.batch.itl_slo_s == 0.2, "steps keep it too"


def test_places_of_workers_that_may_be_added(tmp_path: Path) -> None:
    options = options_of(
        tmp_path, "--prefill", "1", "--decode", "2", "--separate-pools", "--autoscale", "0:6"
    )
    places = [(spec.pool, spec.dial) for spec in options.workers()]
    assert options.num_started == 3
    assert places == [(0, 100), (1, 0), (1, 0), (1, 0), (0, 100), (1, 0)]


def test_one_worker_at_most_does_both(tmp_path: Path) -> None:
    options = options_of(tmp_path, "--autoscale", "0:1")
    assert [spec.dial for spec in options.workers()] == [50]


def test_what_to_start_with_lies_within_the_range(tmp_path: Path) -> None:
    for flags in (
        ("--autoscale", "3:4"),
        ("--autoscale", "1:1", "--prefill", "1", "--decode", "1"),
    ):
        with pytest.raises(ConfigError, match="--autoscale"):
            options_of(tmp_path, *flags)
