"""Published configurations parse to known models; what cannot be served is refused, and why."""

import json
from pathlib import Path
from typing import Any

import pytest

from diptych.engine.core.errors import ConfigError, ModelLoadError
from diptych.engine.core.model_config import ModelConfig, load_model_config

CONFIGS = Path(__file__).parents[2] / "data" / "configs"

# name -> (published number of parameters, dtype, max_model_len, EOS ids)
PUBLISHED: dict[str, tuple[int, str, int, set[int]]] = {
    "Llama-2-7b-hf": (6_738_415_616, "float16", 4096, {2}),
    "Llama-3.1-8B-Instruct": (8_030_261_248, "bfloat16", 131_072, {128001, 128008, 128009}),
    "Llama-3.2-1B": (1_235_814_400, "bfloat16", 131_072, {128001}),
    "Mistral-7B-v0.1": (7_241_732_096, "bfloat16", 32_768, {2}),
    "Mistral-7B-Instruct-v0.3": (7_248_023_552, "bfloat16", 32_768, {2}),
    "Mistral-Nemo-Instruct-2407": (12_247_782_400, "bfloat16", 131_072, {2}),
    "Qwen2-0.5B": (494_032_768, "bfloat16", 131_072, {151643}),
    "Qwen2-7B": (7_615_616_512, "bfloat16", 131_072, {151643}),
    "Qwen2.5-1.5B": (1_543_714_304, "bfloat16", 131_072, {151643}),
    "Qwen2.5-7B-Instruct": (7_615_616_512, "bfloat16", 32_768, {151643, 151645}),
    "Qwen3-0.6B": (596_049_920, "bfloat16", 40_960, {151643, 151645}),
    "Qwen3-8B": (8_190_735_360, "bfloat16", 40_960, {151643, 151645}),
}

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}


def load(folder: Path, generation: dict[str, Any] | None = None, /, **fields: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(BASE | fields))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return load_model_config(folder)


def num_parameters(config: ModelConfig) -> int:
    total = 0
    for shape in config.weight_shapes().values():
        size = 1
        for length in shape:
            size *= length
        total += size
    return total


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str) -> None:
    config = load_model_config(CONFIGS / name)
    parameters, dtype, length, eos = PUBLISHED[name]
    assert num_parameters(config) == parameters
    assert config.dtype == dtype
    assert config.max_model_len == length
    assert config.eos_token_ids == eos


def test_every_stored_config_is_tested() -> None:
    assert {path.name for path in CONFIGS.iterdir()} == PUBLISHED.keys()


def test_facts_of_published_models() -> None:
    llama = load_model_config(CONFIGS / "Llama-3.1-8B-Instruct")
    assert llama.block_bytes(16) == 2 << 20
    assert llama.num_blocks_for(1 << 30, 16) == 512
    assert llama.block_bytes(16, "int8") == (1 << 20) * (128 + 4) // 128
    assert llama.kv_dtype("auto", "int8", "float32") == "int8"
    assert llama.kv_dtype("auto") == llama.dtype == "bfloat16"
    assert (llama.rope.type, llama.rope.factor, llama.rope.original_len) == ("llama3", 8.0, 8192)
    assert llama.sampling_defaults == {"temperature": 0.6, "top_p": 0.9}
    mistral = load_model_config(CONFIGS / "Mistral-7B-v0.1")
    assert mistral.windows == (4096,) * 32
    nemo = load_model_config(CONFIGS / "Mistral-Nemo-Instruct-2407")
    assert (nemo.q_size, nemo.hidden_size) == (4096, 5120)
    assert nemo.windows == (None,) * 40
    qwen2 = load_model_config(CONFIGS / "Qwen2.5-7B-Instruct")
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    assert qwen2.sampling_defaults["repetition_penalty"] == 1.05
    assert qwen2.sampling_defaults["top_k"] == 20
    qwen3 = load_model_config(CONFIGS / "Qwen3-0.6B")
    assert (qwen3.qk_norm, qwen3.qkv_bias, qwen3.tied_embeddings) == (True, False, True)


def test_a_greedy_generation_config_means_temperature_0() -> None:
    config = load_model_config(CONFIGS / "Qwen2-0.5B")
    assert config.sampling_defaults == {"temperature": 0.0, "max_tokens": 2048}


def test_dtype_and_length_can_be_chosen() -> None:
    config = load_model_config(CONFIGS / "Mistral-7B-v0.1", "float32", 1024)
    assert (config.dtype, config.max_model_len) == ("float32", 1024)
    assert config.windows == (None,) * 32, "a window that no sequence reaches is none"
    with pytest.raises(ConfigError, match="between 1 and 32768"):
        load_model_config(CONFIGS / "Mistral-7B-v0.1", max_model_len=40_000)


@pytest.mark.parametrize(
    ("scaling", "length", "factor"),
    [
        ({"rope_type": "linear", "factor": 4}, 512, 4.0),
        ({"type": "dynamic", "factor": 2.0}, 256, 2.0),
        ({"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}, 256, 8.0),
        ({"type": "yarn", "original_max_position_embeddings": 32}, 128, 4.0),
    ],
)
def test_rope_scalings(tmp_path: Path, scaling: dict[str, Any], length: int, factor: float) -> None:
    for name in ("rope_scaling", "rope_parameters"):
        config = load(tmp_path, **{name: scaling, "rope_theta": 5e5})
        assert (config.max_model_len, config.rope.factor) == (length, factor)
        assert config.rope.theta == 5e5


def test_transformers_5_spelling(tmp_path: Path) -> None:
    flat = {"rope_theta": 7e4, "rope_type": "linear", "factor": 2.0}
    config = load(tmp_path, rope_parameters=flat, dtype="bfloat16")
    assert (config.rope.type, config.rope.theta, config.dtype) == ("linear", 7e4, "bfloat16")
    nested = {"full_attention": flat, "sliding_attention": flat}
    assert load(tmp_path, rope_parameters=nested).rope == config.rope


def test_dynamic_rope_is_frozen_at_the_length(tmp_path: Path) -> None:
    load(tmp_path, rope_scaling={"type": "dynamic", "factor": 4.0})
    assert load_model_config(tmp_path).rope.frozen_len == 512
    assert load_model_config(tmp_path, max_model_len=200).rope.frozen_len == 200
    assert load_model_config(tmp_path, max_model_len=100).rope.frozen_len == 128


def test_sliding_windows(tmp_path: Path) -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32}
    assert load(tmp_path, **qwen).windows == (None,) * 4
    config = load(tmp_path, **qwen, use_sliding_window=True, max_window_layers=3)
    assert config.windows == (None, None, None, 32)
    types = ["sliding_attention", "full_attention"] * 2
    config = load(tmp_path, **qwen, use_sliding_window=True, layer_types=types)
    assert config.windows == (32, None, 32, None)
    mistral = {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}
    assert load(tmp_path, **mistral, sliding_window=50).windows == (50,) * 4
    assert load(tmp_path, **mistral, sliding_window=None).windows == (None,) * 4
    long = load(tmp_path, **mistral, max_position_embeddings=8192)
    assert long.windows == (4096,) * 4, "absent means the family's default, unlike null"


def test_model_type_stands_in_for_architectures(tmp_path: Path) -> None:
    assert load(tmp_path, architectures=None, model_type="qwen3").qk_norm


def test_eos_ids_are_those_of_both_files(tmp_path: Path) -> None:
    assert load(tmp_path, {"eos_token_id": [5, 2]}, eos_token_id=[2, 3]).eos_token_ids == {2, 3, 5}
    assert load(tmp_path, {}, eos_token_id=None).eos_token_ids == frozenset()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported"),
        ({"architectures": None, "model_type": "mamba"}, "architecture mamba"),
        ({"quantization_config": {"bits": 4}}, "quantized checkpoints"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "remote code is never run"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "rope type 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "must be at least 1, got 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a number"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rope_theta": 0.5}, None),  # without scaling, too
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 0}, "hidden_size must be an integer in [1, 2147483647], got 0"),
        ({"hidden_size": True}, "hidden_size must be an integer"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers must be an integer in [1, 1024]"),
        ({"max_position_embeddings": 10**9}, "max_position_embeddings must be"),
        ({"rope_scaling": {"type": "linear", "factor": 1e9}}, "longer than"),
        ({"hidden_size": 66}, "multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"torch_dtype": "float64"}, "dtype 'float64'"),
        ({"eos_token_id": "2"}, "eos_token_id must be a token id"),
        ({"eos_token_id": 100}, "outside the vocabulary"),
        ({"sliding_window": 32}, "not defined for LlamaForCausalLM"),
        ({"layer_types": ["full_attention"]}, "1 entries for 4 layers"),
        ({"layer_types": ["linear_attention"] * 4}, "linear_attention"),
        ({"layer_types": ["sliding_attention"] * 4}, "disagrees with sliding_window"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be finite and above 0"),
        ({"tie_word_embeddings": "yes"}, "must be true or false"),
    ],
)
def test_refusals_name_the_file_and_the_reason(
    tmp_path: Path, fields: dict[str, Any], reason: str | None
) -> None:
    with pytest.raises(ModelLoadError) as caught:
        load(tmp_path, **fields)
    assert str(tmp_path / "config.json") in caught.value.message
    assert (reason or "rope_theta must be above 1") in caught.value.message


@pytest.mark.parametrize(
    "generation",
    [{"temperature": -1}, {"top_p": 2.0}, {"top_k": "20"}, {"eos_token_id": -1}],
)
def test_bad_generation_configs(tmp_path: Path, generation: dict[str, Any]) -> None:
    with pytest.raises(ModelLoadError, match=r"generation_config\.json"):
        load(tmp_path, generation)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_broken_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        load_model_config(tmp_path)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"nowhere/config\.json: cannot be read"):
        load_model_config(tmp_path / "nowhere")
