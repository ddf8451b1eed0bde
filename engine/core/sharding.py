"""How a decoder is cut into shards: which heads, inner columns and tokens of the head each one has.

A launch cuts its model into as many shards as any of its workers needs; each rank of a worker
computes a run of neighbouring shards. Owns the arithmetic, no weights. Invariant: sums over shards
are added in the order of the shards, so the number of shards is part of the numerics fingerprint,
and how many ranks they are spread over is not.
"""

from dataclasses import dataclass

from diptych.engine.core.errors import ConfigError
from diptych.engine.core.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Shard:
    """All shards of a model have equally many heads and inner columns."""

    q_heads: range
    kv_heads: range  # where there are fewer than shards: one that neighbours have too
    inner: range  # columns of the MLP
    vocab: range  # outputs of the output head


def cut(config: ModelConfig, num_shards: int) -> list[Shard]:
    """Raises ConfigError where the model cannot be cut evenly."""
    _verify(config, num_shards)
    kv_each = max(1, config.num_kv_heads // num_shards)

    def part(total: int, index: int) -> range:
        return range(total * index // num_shards, total * (index + 1) // num_shards)

    shards = []
    for index in range(num_shards):
        kv_first = config.num_kv_heads * index // num_shards
        shards.append(
            Shard(
                q_heads=part(config.num_q_heads, index),
                kv_heads=range(kv_first, kv_first + kv_each),
                inner=part(config.intermediate_size, index),
                vocab=part(config.vocab_size, index),
            )
        )
    return shards


def shards_of_rank(num_shards: int, rank: int, num_ranks: int) -> range:
    """The shards that one rank of a worker computes."""
    assert num_shards % num_ranks == 0
    assert 0 <= rank < num_ranks
    each = num_shards // num_ranks
    return range(rank * each, (rank + 1) * each)


def _verify(config: ModelConfig, num_shards: int) -> None:
    if num_shards < 1:
        raise ConfigError(f"a tensor-parallel size must be at least 1, got {num_shards}")
    for what, count in (
        ("attention heads", config.num_q_heads),
        ("inner columns of the MLP (intermediate_size)", config.intermediate_size),
    ):
        if count % num_shards:
            raise ConfigError(
                f"the model's {count} {what} cannot be divided by the tensor-parallel size"
                f" {num_shards}"
            )
    kv_heads = config.num_kv_heads
    if kv_heads % num_shards and num_shards % kv_heads:
        raise ConfigError(
            f"the model's {kv_heads} KV heads can neither be divided by the tensor-parallel size"
            f" {num_shards} nor each be given to equally many ranks"
        )
    if config.vocab_size < num_shards:
        raise ConfigError(f"a vocabulary of {config.vocab_size} is smaller than {num_shards} ranks")
