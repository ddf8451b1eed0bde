"""Checkpoints load whatever their sharding and dtype; broken ones are refused by name and why."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.drive import Driver
from bench.oracle import make_checkpoint
from diptych.engine.core.config import ModelOptions
from diptych.engine.core.errors import ModelLoadError
from diptych.engine.core.model_config import ModelConfig, load_model_config
from diptych.engine.loader import CheckpointWeights, DummyWeights, open_weights
from diptych.engine.runner import load_model
from diptych.engine.safetensors_file import SafetensorsFile

CONFIGS = Path(__file__).parents[2] / "data" / "configs"
FULL_WIDTH = {"Llama-3.2-1B", "Qwen2-0.5B", "Qwen2.5-1.5B", "Qwen3-0.6B"}  # light enough for a test


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path, "llama2")
    return tmp_path


def shard(folder: Path, num_files: int) -> None:
    """Splits model.safetensors as save_pretrained would."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number in range(num_files):
        name = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[number::num_files]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def rewrite(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Replaces, adds or (None) removes tensors of model.safetensors."""
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


def refusal(folder: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        CheckpointWeights(folder, load_model_config(folder))
    return caught.value.message


def test_reads_what_safetensors_reads(folder: Path) -> None:
    wanted = load_file(folder / "model.safetensors")
    file = SafetensorsFile(folder / "model.safetensors")
    assert file.entries.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(file.tensor(name), tensor)


def test_shards_are_the_same_model(folder: Path) -> None:
    config = load_model_config(folder)
    single = CheckpointWeights(folder, config)
    names = list(config.weight_shapes())
    wanted = {name: single.get(name) for name in names}
    shard(folder, 3)
    sharded = CheckpointWeights(folder, config)
    assert sharded.identity() == single.identity()
    assert all(torch.equal(sharded.get(name), wanted[name]) for name in names)


def test_the_stored_dtype_is_converted(folder: Path) -> None:
    config = load_model_config(folder, "bfloat16")
    weights = CheckpointWeights(folder, config)
    stored = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert torch.equal(weights.get("model.norm.weight"), stored.bfloat16())


def test_the_identity_follows_the_content(folder: Path) -> None:
    config = load_model_config(folder)
    first = CheckpointWeights(folder, config).identity()
    norm = load_file(folder / "model.safetensors")["model.norm.weight"]
    rewrite(folder, {"model.norm.weight": norm + 1})
    assert CheckpointWeights(folder, config).identity() != first
    rewrite(folder, {"model.norm.weight": norm})
    assert CheckpointWeights(folder, config).identity() == first


def test_what_old_checkpoints_store_is_ignored(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama3")  # tied
    config = load_model_config(tmp_path)
    identity = CheckpointWeights(tmp_path, config).identity()
    old: dict[str, Tensor | None] = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "lm_head.weight": torch.zeros(160, 64),
    }
    rewrite(tmp_path, old)
    assert CheckpointWeights(tmp_path, config).identity() == identity


def test_tensors_that_do_not_fit(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    original = load_file(folder / "model.safetensors")[name]
    rewrite(folder, {name: original[:, :8].contiguous()})
    message = refusal(folder)
    assert str(folder / "model.safetensors") in message
    assert f"{name!r} has the shape [112, 8], config.json asks for [112, 64]" in message
    rewrite(folder, {name: None})
    assert f"lack 1 tensors, such as {name}" in refusal(folder)
    rewrite(folder, {name: original, "model.layers.9.extra": torch.ones(2)})
    assert "holds 'model.layers.9.extra', which LlamaForCausalLM does not have" in refusal(folder)
    rewrite(folder, {"model.layers.9.extra": None, name: original.to(torch.int8)})
    weights = CheckpointWeights(folder, load_model_config(folder))
    with pytest.raises(ModelLoadError, match="stored as I8; only F32, F16 and BF16"):
        weights.get(name)


def test_folders_without_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor model.safetensors.index.json" in refusal(folder)
    (folder / "consolidated.safetensors").write_bytes(b"")
    assert "consolidated weights only" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    message = refusal(folder)
    assert "pickled weights only" in message
    assert "save_pretrained" in message


def test_bad_indices(folder: Path) -> None:
    shard(folder, 2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"]))

    def refused(weight_map: object) -> str:
        path.write_text(json.dumps({"weight_map": weight_map}))
        return refusal(folder)

    assert "weight_map is missing" in refused({})
    assert "no file of this folder" in refused(index["weight_map"] | {first: "../x.safetensors"})
    assert "no file of this folder" in refused(index["weight_map"] | {first: "x.bin"})
    assert "x.safetensors: cannot be read" in refused({first: "x.safetensors"})
    assert "lacks 'ghost'" in refused({"ghost": "model-00001-of-00002.safetensors"})
    path.write_text("{")
    assert "is no valid JSON" in refusal(folder)


def test_every_truncation_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    rng = random.Random(5)
    header = int.from_bytes(whole[:8], "little")
    cuts = [0, 1, 7, 8, 9, 8 + header - 1, 8 + header, len(whole) - 1]
    for size in [*cuts, *(rng.randrange(len(whole)) for _ in range(20))]:
        path.write_bytes(whole[:size])
        message = refusal(folder)
        assert str(path) in message, size
    path.write_bytes(whole + b"\0")
    assert "1 bytes that belong to no tensor" in refusal(folder)


def test_damaged_headers_are_refused_or_harmless(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for seed in range(200):
        rng = random.Random(seed)
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(8 + header)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            file = SafetensorsFile(path)
            for name in file.entries:
                file.tensor(name)
        except ModelLoadError as error:
            if str(path) not in error.message:
                pytest.fail(f"seed {seed}: {error.message}")


@pytest.mark.parametrize(
    "entry",
    [
        1,
        {},
        {"dtype": "F32", "shape": [2], "data_offsets": [0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, -8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
    ],
)
def test_broken_header_entries(tmp_path: Path, entry: object) -> None:
    header = json.dumps({"x": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ModelLoadError, match="'x'"):
        SafetensorsFile(path)


def test_unaligned_tensors(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for padding in range(4):
        header = json.dumps({"x": entry}).encode() + b" " * padding
        data = torch.tensor([1.5, -2.0]).numpy().tobytes()
        path = tmp_path / f"{padding}.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + data)
        assert SafetensorsFile(path).tensor("x").tolist() == [1.5, -2.0]


def test_dummy_weights_are_a_function_of_the_seed() -> None:
    config = load_model_config(CONFIGS / "Qwen2-0.5B", "float32")
    name = "model.layers.3.self_attn.q_proj.weight"
    first, again, other = (DummyWeights(config, seed).get(name) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(first.std()) == pytest.approx(0.02, rel=0.01)
    assert float(first.mean()) == pytest.approx(0.0, abs=1e-4)
    assert DummyWeights(config, 0).get("model.norm.weight").tolist() == [1.0] * 896
    assert not DummyWeights(config, 0).get("model.layers.3.self_attn.q_proj.bias").any()


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.iterdir()))
def test_published_configs_run_with_dummy_weights(tmp_path: Path, name: str) -> None:
    """One layer, a small vocabulary; the widest models at an eighth of their width."""
    fields = json.loads((CONFIGS / name / "config.json").read_text())
    config = load_model_config(CONFIGS / name)
    fields |= {"num_hidden_layers": 1, "vocab_size": 512, "eos_token_id": 2}
    if name not in FULL_WIDTH:
        fields |= {
            "hidden_size": config.hidden_size // 8,
            "intermediate_size": config.intermediate_size // 8,
            "head_dim": config.head_dim,
        }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    options = ModelOptions(path=str(tmp_path), load_format="dummy", max_model_len=256)
    driver = Driver(load_model(options), num_blocks=8)
    driver.add(list(range(40)), 3)
    driver.finish(chunk=16)
    assert all(row.isfinite().all() for row in driver.recorder.logits["0-0-drive"])


def meta_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.iterdir()))
def test_published_configs_ask_for_transformers_tensors(name: str) -> None:
    config: ModelConfig = load_model_config(CONFIGS / name)
    assert config.weight_shapes() == meta_shapes(CONFIGS / name)


def test_load_format_chooses_the_source(folder: Path) -> None:
    config = load_model_config(folder)
    assert open_weights(folder, config, "dummy", 3).identity() == "dummy-3"
    assert isinstance(open_weights(folder, config, "auto", 3), CheckpointWeights)
