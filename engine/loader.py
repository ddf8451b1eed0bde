"""Weights by name, from safetensors files or made up from a seed.

Owns the check of a checkpoint against its configuration. Invariant: a source that was opened holds
exactly the tensors that the configuration asks for, each with its shape; anything else was refused
with file and reason. No pickle is read and no code of a checkpoint is run.
"""

from hashlib import sha256
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

from diptych.engine.core.errors import ModelLoadError
from diptych.engine.core.json_fields import JsonFields
from diptych.engine.core.model_config import ModelConfig
from diptych.engine.hub import resolve_model
from diptych.engine.safetensors_file import SafetensorsFile

__all__ = [
    "TORCH_DTYPES",
    "CheckpointWeights",
    "DummyWeights",
    "WeightSource",
    "open_weights",
    "resolve_model",
]

TORCH_DTYPES: Final[dict[str, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_DUMMY_STD: Final = 0.02
_NAMES_SHOWN: Final = 3


class WeightSource(Protocol):
    """`get` gives the tensor in the model's dtype, as a fresh or mapped tensor; do not write it."""

    def get(self, name: str) -> Tensor: ...

    def identity(self) -> str:
        """Equal for equal weights (of large tensors samples are compared)."""
        ...


class CheckpointWeights:
    """Safetensors of a folder, checked against the configuration."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self._dtype = TORCH_DTYPES[config.dtype]
        shapes = config.weight_shapes()
        self._home: dict[str, SafetensorsFile] = {}  # tensor name -> its file
        for file in _open_files(folder):
            for name, entry in file.entries.items():
                if _ignored(name, config):
                    continue
                if name not in shapes:
                    raise ModelLoadError(
                        f"{file.path}: holds {name!r}, which {config.architecture} does not have"
                    )
                if entry.shape != shapes[name]:
                    raise ModelLoadError(
                        f"{file.path}: {name!r} has the shape {list(entry.shape)}, config.json"
                        f" asks for {list(shapes[name])}"
                    )
                if name in self._home:
                    raise ModelLoadError(
                        f"{file.path}: {name!r} is also in {self._home[name].path.name}"
                    )
                self._home[name] = file
        missing = [name for name in shapes if name not in self._home]
        if missing:
            raise ModelLoadError(
                f"{folder}: its safetensors lack {len(missing)} tensors, such as"
                f" {', '.join(missing[:_NAMES_SHOWN])}"
            )

    def get(self, name: str) -> Tensor:
        return self._home[name].tensor(name).to(self._dtype)

    def identity(self) -> str:
        digest = sha256()
        for name in sorted(self._home):
            digest.update(self._home[name].digest(name))
        return digest.hexdigest()


class DummyWeights:
    """Weights from (seed, name, shape) alone: matrices of std 0.02, norms 1, biases 0."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._dtype = TORCH_DTYPES[config.dtype]
        self._shapes = config.weight_shapes()
        self._seed = seed

    def get(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if name.endswith(".bias"):
            return torch.zeros(shape, dtype=self._dtype)
        if len(shape) == 1:
            return torch.ones(shape, dtype=self._dtype)
        seed = int.from_bytes(sha256(f"{self._seed}\0{name}".encode()).digest()[:8], "little")
        generator = torch.Generator().manual_seed(seed >> 1)
        values = torch.empty(shape, dtype=torch.float32).normal_(0, _DUMMY_STD, generator=generator)
        return values.to(self._dtype)

    def identity(self) -> str:
        return f"dummy-{self._seed}"


def open_weights(folder: Path, config: ModelConfig, load_format: str, seed: int) -> WeightSource:
    """The weights of `folder`; load_format "dummy" needs no weight files."""
    if load_format == "dummy":
        return DummyWeights(config, seed)
    return CheckpointWeights(folder, config)


def _ignored(name: str, config: ModelConfig) -> bool:
    """Old checkpoints store what is computed here, or a copy of the tied embedding."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    return config.tied_embeddings and name == "lm_head.weight"


def _open_files(folder: Path) -> list[SafetensorsFile]:
    if (folder / _SINGLE).is_file():
        return [SafetensorsFile(folder / _SINGLE)]
    if not (folder / _INDEX).is_file():
        raise _no_weights(folder)
    index = JsonFields.read(folder / _INDEX)
    weight_map = index.child("weight_map")
    if weight_map is None:
        raise index.bad("weight_map is missing or empty")
    files: dict[str, SafetensorsFile] = {}
    for name in weight_map.fields:
        file_name = weight_map.text(name) or ""
        if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
            raise index.bad(f"{name!r} points to {file_name!r}, which is no file of this folder")
        if file_name not in files:
            files[file_name] = SafetensorsFile(folder / file_name)
        if name not in files[file_name].entries:
            raise ModelLoadError(f"{folder / file_name}: lacks {name!r}, which {_INDEX} puts there")
    return [files[file_name] for file_name in sorted(files)]


def _no_weights(folder: Path) -> ModelLoadError:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return ModelLoadError(
            f"{folder}: holds pickled weights only, which can run code when read. Convert them"
            ' where you trust them: python -c "from transformers import AutoModelForCausalLM as M;'
            f" M.from_pretrained('{folder}').save_pretrained('OUT')\""
        )
    if any(folder.glob("consolidated*.safetensors")):
        return ModelLoadError(
            f"{folder}: holds consolidated weights only; the Hugging Face layout ({_SINGLE} or"
            f" {_INDEX}) is needed"
        )
    return ModelLoadError(f"{folder}: holds neither {_SINGLE} nor {_INDEX}")
