"""Choosing a backend and a level."""

import logging
from pathlib import Path

import pytest
import torch

from diptych import kernels
from diptych.engine.core.errors import ConfigError
from diptych.kernels import Kernels, library
from diptych.kernels.cpp import CppKernels, available_levels


def test_the_best_level_is_the_default() -> None:
    assert kernels.load("cpp").level == available_levels()[-1]
    assert kernels.load("auto").level == available_levels()[-1]
    assert available_levels()[0] == "plain"


def test_each_level_has_its_own_fingerprint() -> None:
    prints = {kernels.load("cpp", level).fingerprint() for level in available_levels()}
    prints.add(kernels.load("reference").fingerprint())
    assert len(prints) == len(available_levels()) + 1


def test_an_unknown_level_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="plain"):
        kernels.load("cpp", "sse9")


def test_two_levels_live_side_by_side() -> None:
    plain, best = CppKernels("plain"), CppKernels()
    plain.set_level(best.level)
    assert plain.fingerprint() == best.fingerprint()


def test_without_the_library_auto_warns_and_cpp_says_what_to_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "find", lambda: None)
    library.load.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            backend: Kernels = kernels.load("auto")
        assert backend.level == "reference"
        assert "cmake" in caplog.text
        with pytest.raises(ConfigError, match="cmake"):
            kernels.load("cpp")
    finally:
        library.load.cache_clear()


def test_levels_agree_closely() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(8, 96, generator=generator)
    weight = torch.randn(64, 96, generator=generator).to(torch.bfloat16)
    results = []
    for level in available_levels():
        backend = CppKernels(level)
        out = torch.empty(8, 64)
        backend.linear(out, x, backend.pack_linear(weight, None))
        results.append(out)
    for out in results[1:]:
        torch.testing.assert_close(out, results[0], rtol=0, atol=2e-4)
