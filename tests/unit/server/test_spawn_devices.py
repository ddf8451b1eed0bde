"""A worker computes on the GPUs that were assigned to it, and on no other's."""

import os

import pytest

from diptych.server.spawn import see_devices


def test_each_worker_sees_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    see_devices([], 0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7", "nobody assigned any"
    see_devices(["0", "2,3", ""], 1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"
    see_devices(["0", "2,3", ""], 2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "", "a bundle without GPUs"
