"""Packed weights in a file: equal logits, and every refusal with its reason."""

import json
import shutil
from pathlib import Path

import msgspec
import pytest
import torch

from bench.oracle import make_checkpoint
from diptych.engine.core.config import ModelOptions
from diptych.engine.core.errors import ModelLoadError
from diptych.engine.packed_file import PACKED_NAME, read_key
from diptych.engine.packing import keep_packed
from diptych.engine.runner import LoadedModel, load_model
from diptych.engine.weights_tree import take_apart


@pytest.fixture
def model(tmp_path: Path) -> ModelOptions:
    make_checkpoint(tmp_path / "model", "qwen3", torch.bfloat16)
    return ModelOptions(path=str(tmp_path / "model"))


def packed(loaded: LoadedModel, folder: Path, source: str) -> ModelOptions:
    """A folder with the configuration and packed weights only."""
    folder.mkdir()
    shutil.copy(Path(source) / "config.json", folder)
    keep_packed(loaded.prepared, folder / PACKED_NAME)
    return ModelOptions(path=str(folder))


def tensors(loaded: LoadedModel) -> list[torch.Tensor]:
    return take_apart(loaded.weights)[1]


def assert_same(one: LoadedModel, other: LoadedModel) -> None:
    assert one.fingerprint == other.fingerprint
    assert take_apart(one.weights)[0] == take_apart(other.weights)[0]
    for mine, theirs in zip(tensors(one), tensors(other), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("quantization", [None, "int8", "int4-g32"])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_packed_model_is_the_model(
    model: ModelOptions, tmp_path: Path, quantization: str | None, num_shards: int
) -> None:
    options = msgspec.structs.replace(model, quantization=quantization)
    loaded = load_model(options, num_shards, threads=2)
    again = packed(loaded, tmp_path / "packed", model.path)
    assert read_key(tmp_path / "packed" / PACKED_NAME).quantization == quantization
    assert_same(load_model(again, num_shards), loaded)  # its rounding needs no flag


def test_packing_uses_memory_of_its_own(model: ModelOptions) -> None:
    """One mapping for all, so that forks share it whole."""
    loaded = load_model(model)
    addresses = sorted(tensor.data_ptr() for tensor in tensors(loaded))
    size = sum(tensor.nbytes for tensor in tensors(loaded))
    assert addresses[-1] - addresses[0] < 2 * size + 4096


def test_the_cache_is_written_once_and_used(model: ModelOptions, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    options = msgspec.structs.replace(model, packed_cache=str(cache))
    first = load_model(options)
    path = first.prepared.cache_path
    assert path is not None
    assert path.parent == cache
    keep_packed(first.prepared, path)
    second = load_model(options)
    assert second.prepared.cache_path is None
    assert_same(second, first)
    narrow = load_model(msgspec.structs.replace(options, quantization="int8"))
    assert narrow.prepared.cache_path not in (None, path)
    assert [entry.name for entry in cache.iterdir()] == [path.name]


def test_a_damaged_cache_is_packed_again(
    model: ModelOptions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = msgspec.structs.replace(model, packed_cache=str(tmp_path / "cache"))
    first = load_model(options)
    assert first.prepared.cache_path is not None
    keep_packed(first.prepared, first.prepared.cache_path)
    first.prepared.cache_path.write_bytes(b"DIPTYCHW and nothing else")
    again = load_model(options)
    assert "packing once more" in caplog.text
    assert again.prepared.cache_path == first.prepared.cache_path
    assert_same(again, first)


def test_what_was_packed_otherwise_is_refused(model: ModelOptions, tmp_path: Path) -> None:
    ready = packed(load_model(model), tmp_path / "packed", model.path)
    other = msgspec.structs.replace
    with pytest.raises(ModelLoadError, match=r"quantization None, asked for is int8"):
        load_model(other(ready, quantization="int8"))
    with pytest.raises(ModelLoadError, match=r"kernels cpp-.*, asked for is reference"):
        load_model(other(ready, kernels="reference"))
    with pytest.raises(ModelLoadError, match=r"kernels cpp-.*, asked for is cpp-\d+-plain"):
        load_model(other(ready, kernel_level="plain"))
    with pytest.raises(ModelLoadError, match="num_shards 1, asked for is 2"):
        load_model(ready, 2)
    with pytest.raises(ModelLoadError, match="another version or model"):
        load_model(other(ready, dtype="float32"))
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="another version or model"):
        load_model(ready)


def test_broken_files_are_refused(model: ModelOptions, tmp_path: Path) -> None:
    ready = packed(load_model(model), tmp_path / "packed", model.path)
    path = tmp_path / "packed" / PACKED_NAME
    whole = path.read_bytes()
    middle = len(whole) // 2
    for content, reason in (
        (b"", "empty"),
        (b"PK\3\4" + whole[4:], "no packed weights"),
        (whole[:12], "no packed weights"),
        (whole[:-64], "bytes, not the"),
        (whole + bytes(64), "bytes, not the"),
        (whole[:8] + (2).to_bytes(8, "little") + b"{}" + whole[18:], "another version"),
        (whole[:middle] + bytes(8192) + whole[middle + 8192 :], "damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(ModelLoadError, match=reason):
            load_model(ready)
    header_end = 16 + int.from_bytes(whole[8:16], "little")
    header = json.loads(whole[16:header_end])
    header["tree"] = {"type": "os.system", "fields": {}}
    changed = json.dumps(header).encode().ljust(header_end - 16)[: header_end - 16]
    path.write_bytes(whole[:16] + changed + whole[header_end:])
    with pytest.raises(ModelLoadError, match="broken tree"):
        load_model(ready)
