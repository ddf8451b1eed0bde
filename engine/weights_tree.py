"""Packed weights as a tree: its tensors taken out, and put in again.

Owns the list of types that may be in such a tree, and how its shape is written as JSON. Invariant:
`rebuild(*take_apart(tree))` equals the tree; nothing but the types listed here is ever made, so a
file can ask for no code to run.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from diptych.engine.core.errors import ModelLoadError
from diptych.engine.core.sharding import Shard
from diptych.engine.models.weights import DecoderWeights, LayerShard, LayerWeights
from diptych.kernels import Narrow, PackedLinear

__all__ = ["SHAPE_VERSION", "map_tensors", "rebuild", "take_apart"]

_TYPES: Final[dict[str, type]] = {
    kind.__name__: kind
    for kind in (DecoderWeights, LayerShard, LayerWeights, Narrow, PackedLinear, Shard)
}
_DTYPES: Final = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.uint8,
        torch.int8,
        torch.int32,
    )
}
# Changes with any field of any of the types, so that no file of another version is misread.
SHAPE_VERSION: Final = ";".join(
    f"{name}({','.join(field.name for field in dataclasses.fields(kind))})"
    for name, kind in _TYPES.items()
)

Json = dict[str, Any] | list[Any] | int | float | str | None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: object) -> torch.dtype:
    if not isinstance(name, str) or name not in _DTYPES:
        raise ModelLoadError(f"packed weights: unknown dtype {name!r}")
    return _DTYPES[name]


def take_apart(tree: object) -> tuple[Json, list[Tensor]]:
    """The tree's shape, in which tensors are numbers, and the tensors; one used twice is one."""
    tensors: list[Tensor] = []
    places: dict[int, int] = {}  # id of a tensor -> its number

    def shape(node: object) -> Json:
        match node:
            case Tensor():
                place = places.setdefault(id(node), len(tensors))
                if place == len(tensors):
                    tensors.append(node)
                return {"tensor": place}
            case torch.dtype():
                return {"dtype": dtype_name(node)}
            case range():
                return {"range": [node.start, node.stop]}
            case list():
                return [shape(item) for item in node]
            case None | bool() | int() | float() | str():
                return node
        assert type(node) is _TYPES.get(type(node).__name__), f"{type(node)} in packed weights"
        assert dataclasses.is_dataclass(node)
        fields = {f.name: shape(getattr(node, f.name)) for f in dataclasses.fields(node)}
        return {"type": type(node).__name__, "fields": fields}

    return shape(tree), tensors


def rebuild(shape: Json, tensors: list[Tensor]) -> object:
    """Raises ModelLoadError for a shape that `take_apart` cannot have made."""
    try:
        return _rebuild(shape, tensors)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ModelLoadError(f"packed weights: a broken tree ({error!r})") from error


def _rebuild(shape: Json, tensors: list[Tensor]) -> object:
    if isinstance(shape, list):
        return [_rebuild(item, tensors) for item in shape]
    if not isinstance(shape, dict):
        return shape
    match shape:
        case {"tensor": int(place)} if place >= 0:
            return tensors[place]
        case {"dtype": name}:
            return dtype_of(name)
        case {"range": [int(start), int(stop)]}:
            return range(start, stop)
        case {"type": str(name), "fields": dict(fields)}:
            values = {key: _rebuild(value, tensors) for key, value in fields.items()}
            return _TYPES[name](**values)
    raise ValueError("an unknown node")


def map_tensors(tree: object, change: Callable[[Tensor], Tensor]) -> object:
    """The same tree with every tensor changed, each once."""
    shape, tensors = take_apart(tree)
    return _rebuild(shape, [change(tensor) for tensor in tensors])
