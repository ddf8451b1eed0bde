"""Cutting a model: nothing is left out, nothing uneven is accepted."""

import json
import random
from pathlib import Path

import pytest

from diptych.engine.core.errors import ConfigError
from diptych.engine.core.model_config import ModelConfig, load_model_config
from diptych.engine.core.sharding import cut, shards_of_rank


def config_of(folder: Path, q_heads: int, kv_heads: int, inner: int, vocab: int) -> ModelConfig:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8 * q_heads,
        "num_hidden_layers": 1,
        "num_attention_heads": q_heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return load_model_config(folder)


def test_every_part_is_in_one_shard_and_each_query_head_beside_its_kv_head(tmp_path: Path) -> None:
    rng = random.Random(5)
    for _ in range(40):
        num_shards = rng.choice([1, 2, 3, 4, 8])
        kv_heads = num_shards * rng.choice([1, 2]) if rng.random() < 0.5 else 1
        if rng.random() < 0.3:
            kv_heads = next(n for n in (4, 3, 2, 1) if num_shards % n == 0)
        group = rng.choice([1, 2, 4]) * num_shards
        vocab = rng.randrange(num_shards, 400)
        config = config_of(tmp_path, kv_heads * group, kv_heads, 24 * num_shards, vocab)
        shards = cut(config, num_shards)
        for field, total in (("q_heads", kv_heads * group), ("inner", 24 * num_shards)):
            covered = [head for shard in shards for head in getattr(shard, field)]
            assert covered == list(range(total))
        assert [token for shard in shards for token in shard.vocab] == list(range(vocab))
        assert {head for shard in shards for head in shard.kv_heads} == set(range(kv_heads))
        for shard in shards:
            each = len(shard.q_heads) // len(shard.kv_heads)
            for place, head in enumerate(shard.q_heads):
                assert head // group == shard.kv_heads[place // each]


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "inner", "vocab", "num_shards", "message"),
    [
        (4, 2, 24, 96, 3, "4 attention heads cannot be divided by the tensor-parallel size 3"),
        (4, 2, 25, 96, 2, "25 inner columns"),
        (12, 3, 24, 96, 2, "3 KV heads can neither"),
        (4, 2, 24, 3, 4, "vocabulary of 3"),
        (4, 2, 24, 96, 0, "at least 1, got 0"),
    ],
)
def test_what_cannot_be_cut_evenly_is_refused(
    tmp_path: Path,
    q_heads: int,
    kv_heads: int,
    inner: int,
    vocab: int,
    num_shards: int,
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        cut(config_of(tmp_path, q_heads, kv_heads, inner, vocab), num_shards)


def test_ranks_share_the_shards_out_in_order() -> None:
    for num_shards, num_ranks in ((1, 1), (4, 1), (4, 2), (6, 3), (4, 4)):
        ranks = [shards_of_rank(num_shards, rank, num_ranks) for rank in range(num_ranks)]
        assert [shard for rank in ranks for shard in rank] == list(range(num_shards))
