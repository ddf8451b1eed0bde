"""Where a model's packed weights come from: a packed file, the cache of such files, or packing.

Owns that choice and the arena that weights are packed into. Invariant: whichever way was taken, the
weights are equal bit for bit and have the identity of the checkpoint they come from.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import cast

import msgspec
import torch
from torch import Tensor

from diptych.engine.arena import Arena
from diptych.engine.core.config import ModelOptions
from diptych.engine.core.errors import ModelLoadError
from diptych.engine.core.model_config import ModelConfig
from diptych.engine.loader import TORCH_DTYPES, WeightSource, open_weights
from diptych.engine.models.rope import cos_sin_table
from diptych.engine.models.weights import DecoderWeights, pack_weights
from diptych.engine.packed_file import (
    PACKED_NAME,
    PackedKey,
    PackedWeights,
    open_packed,
    read_key,
    write_packed,
)
from diptych.engine.weights_tree import map_tensors
from diptych.kernels import Kernels, Narrow

__all__ = ["Prepared", "Progress", "keep_packed", "packed_quantization", "prepare_weights"]

Progress = Callable[[int, int], None]  # bytes packed so far, of how many

_log = logging.getLogger("diptych")


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    weights: DecoderWeights
    identity: str  # of the checkpoint
    key: PackedKey
    cache_path: Path | None  # where they should be kept and are not yet


def packed_quantization(options: ModelOptions) -> str | None:
    """How the weights of a packed model's folder are rounded, which needs no flag."""
    own = Path(options.path) / PACKED_NAME
    if options.load_format != "auto" or not own.is_file():
        return None
    return read_key(own).quantization


def prepare_weights(
    options: ModelOptions,
    config: ModelConfig,
    kernels: Kernels,
    key: PackedKey,
    narrow: Narrow | None,
    on_progress: Progress | None = None,
) -> Prepared:
    """Raises ModelLoadError or ConfigError."""
    folder = Path(options.path)
    own = folder / PACKED_NAME
    if options.load_format == "auto" and own.is_file():
        try:
            return _prepared(open_packed(own, key), config, key)
        except ModelLoadError as error:
            if not any(folder.glob("*.safetensors")):
                raise
            _log.warning("packing once more: %s", error.message)
    source = open_weights(folder, config, options.load_format, options.seed)
    cached = None
    if options.packed_cache is not None:
        cached = Path(options.packed_cache) / _cache_name(key, source.identity())
        if cached.is_file():
            try:
                return _prepared(open_packed(cached, key), config, key)
            except ModelLoadError as error:
                _log.warning("packing once more: %s", error.message)
    weights = _pack(config, source, kernels, narrow, key.num_shards, on_progress)
    return Prepared(weights, source.identity(), key, cached)


def keep_packed(prepared: Prepared, path: Path) -> int:
    """Writes the weights; returns the file's size. Raises ModelLoadError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelLoadError(f"{path.parent}: cannot be made ({error.strerror})") from error
    bare = replace(prepared.weights, cos_sin=torch.empty(0))  # made anew: it depends on a limit
    return write_packed(path, prepared.key, prepared.identity, bare)


def _prepared(packed: PackedWeights, config: ModelConfig, key: PackedKey) -> Prepared:
    table = cos_sin_table(config.rope, config.head_dim, config.max_model_len)
    return Prepared(replace(packed.weights, cos_sin=table), packed.identity, key, None)


def _cache_name(key: PackedKey, identity: str) -> str:
    digest = sha256(msgspec.json.encode(key))
    digest.update(identity.encode())
    return f"{digest.hexdigest()[:32]}.diptych"


def _pack(
    config: ModelConfig,
    source: WeightSource,
    kernels: Kernels,
    narrow: Narrow | None,
    num_shards: int,
    on_progress: Progress | None,
) -> DecoderWeights:
    """Packed into one arena, with all threads that the kernels have."""
    item = TORCH_DTYPES[config.dtype].itemsize
    sizes = {name: _count(shape) * item for name, shape in config.weight_shapes().items()}
    counted = _Counted(source, sizes, on_progress)
    # Room for the padding of panels; what does not fit lies elsewhere, which costs speed only.
    arena = Arena(sum(sizes.values()) * 17 // 16 + (64 << 20))
    kernels.pack_into(arena.empty)
    try:
        weights = pack_weights(config, counted, kernels, narrow, num_shards)
    finally:
        kernels.pack_into(None)
    return cast(DecoderWeights, map_tensors(weights, arena.keep))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


class _Counted:
    """A source that says how far its reader is."""

    def __init__(
        self, source: WeightSource, sizes: dict[str, int], on_progress: Progress | None
    ) -> None:
        self._source = source
        self._sizes = sizes
        self._on_progress = on_progress
        self._total = sum(sizes.values())
        self._done = 0

    def get(self, name: str) -> Tensor:
        tensor = self._source.get(name)
        self._done += self._sizes[name]
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)
        return tensor

    def identity(self) -> str:
        return self._source.identity()
