"""Any config.json is a usable model or a refusal: never another exception, never nonsense."""

import json
import random
from pathlib import Path
from typing import Any, Final

import pytest

from diptych.engine.core.errors import DiptychError
from diptych.engine.core.model_config import ModelConfig, load_model_config
from diptych.engine.models.rope import cos_sin_table

CONFIGS: Final = Path(__file__).parents[2] / "data" / "configs"
VALUES: Final[list[Any]] = [
    *(None, True, False, 0, 1, 2, 3, 7, 64, 4096, -1, 2**31, 2**70, 0.5, 1.5, 1e-9, 1e9, 1e300),
    *("", "yarn", "float16", [], [1, 2], ["full_attention"], {}, {"factor": 2.0}),
    {"type": "yarn", "factor": 1e-3},
    {"type": "yarn", "original_max_position_embeddings": 1, "beta_fast": 1e-9, "beta_slow": 1e9},
    {"type": "dynamic", "factor": 0.1},
    {"type": "linear", "factor": 1e-9},
    {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 1.0000001},
    {"full_attention": {"rope_type": "linear", "factor": 2.0}},
]
SCALINGS: Final = ["rope_scaling", "rope_parameters", "rope_theta", "head_dim", "sliding_window"]


def check(config: ModelConfig) -> None:
    assert config.max_model_len >= 1
    assert len(config.windows) == config.num_layers
    assert config.block_bytes(16) > 0
    if config.head_dim <= 512:
        table = cos_sin_table(config.rope, config.head_dim, min(64, config.max_model_len))
        assert bool(table.isfinite().all())


@pytest.mark.parametrize("part", range(2))
def test_random_fields(tmp_path: Path, part: int) -> None:
    bases = [json.loads((path / "config.json").read_text()) for path in sorted(CONFIGS.iterdir())]
    for seed in range(part * 400, (part + 1) * 400):
        rng = random.Random(seed)
        fields = dict(rng.choice(bases))
        for _ in range(rng.randint(1, 3)):
            name = rng.choice([*fields, *SCALINGS, *SCALINGS])
            fields[name] = rng.choice(VALUES)
        (tmp_path / "config.json").write_text(json.dumps(fields))
        try:
            check(load_model_config(tmp_path, "auto", rng.choice([None, None, 1, 100])))
        except DiptychError:
            continue
        except Exception as error:  # the seed belongs to every failure
            pytest.fail(f"seed {seed}: {error!r} from {fields}")
