"""Rotary position embedding as a checkpoint asks for it, resolved to numbers.

Owns the rope part of `ModelConfig`. Reads both spellings: `rope_theta` + `rope_scaling`, and
`rope_parameters` of transformers 5. Invariant: a scheme that this struct cannot express is refused,
never approximated. How the numbers become a table is in engine/models/rope.py.
"""

import math
from typing import Final, Literal

import msgspec

from diptych.engine.core.json_fields import JsonFields

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]

_THETA_DEFAULT: Final = 10_000.0


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`frozen_len` (dynamic only): the one length whose frequencies serve every position, so that
    a token's KV does not depend on how long its sequence becomes later."""

    type: RopeType = "default"
    theta: float = _THETA_DEFAULT
    factor: float = 1.0
    original_len: int = 0  # tokens; context of the pretraining
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it
    frozen_len: int = 0  # tokens

    def context_len(self, max_position: int) -> int:
        """Tokens that the scaled embedding is meant for."""
        if self.type in ("linear", "dynamic"):
            return int(max_position * self.factor)
        if self.type == "yarn":
            return max(max_position, int(self.original_len * self.factor))
        return max_position


def parse_rope(config: JsonFields, max_position: int) -> RopeConfig:
    """The rope of config.json; `frozen_len` is still 0 (it needs max_model_len)."""
    fields = config.child("rope_scaling") or config.child("rope_parameters")
    fields = _unnest(config, fields)
    theta = config.number("rope_theta", _THETA_DEFAULT)
    if fields is not None:
        theta = fields.number("rope_theta", theta)
    if theta <= 1.0:
        raise config.bad(f"rope_theta must be above 1, got {theta:g}")
    if fields is None:
        return RopeConfig(theta=theta)
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise config.bad("partial_rotary_factor other than 1 is not supported")
    if fields.has("mrope_section"):
        raise config.bad("mrope_section (rope over several axes) is not supported")
    name = fields.text("rope_type") or fields.text("type") or "default"
    if name == "default":
        return RopeConfig(theta=theta)
    if name in ("linear", "dynamic"):
        kind: RopeType = "linear" if name == "linear" else "dynamic"
        factor = _factor(fields)
        return RopeConfig(type=kind, theta=theta, factor=factor, original_len=max_position)
    original_len = config.integer(
        "original_max_position_embeddings",
        fields.integer("original_max_position_embeddings", max_position),
    )
    if name == "llama3":
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        if high <= low:
            raise config.bad(f"high_freq_factor ({high:g}) must exceed low_freq_factor ({low:g})")
        return RopeConfig(
            type="llama3",
            theta=theta,
            factor=_factor(fields),
            original_len=original_len,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    if name == "yarn":
        return _yarn(fields, theta, original_len, max_position)
    raise config.bad(
        f"rope type {name!r} is not supported (default, linear, dynamic, llama3 and yarn are)"
    )


def _yarn(fields: JsonFields, theta: float, original_len: int, max_position: int) -> RopeConfig:
    factor = _factor(fields, max_position / original_len)
    if fields.has("attention_factor"):
        attention_factor = fields.number("attention_factor")
    elif fields.has("mscale") and fields.has("mscale_all_dim"):
        above = _mscale(factor, fields.number("mscale"))
        attention_factor = above / _mscale(factor, fields.number("mscale_all_dim"))
    else:
        attention_factor = _mscale(factor, 1.0)
    return RopeConfig(
        type="yarn",
        theta=theta,
        factor=factor,
        original_len=original_len,
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        truncate=fields.boolean("truncate", True),
        attention_factor=attention_factor,
    )


def _factor(fields: JsonFields, default: float | None = None) -> float:
    factor = fields.number("factor", default)
    if factor < 1.0:
        raise fields.bad(f"the factor of a rope scaling must be at least 1, got {factor:g}")
    return factor


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0


def _unnest(config: JsonFields, fields: JsonFields | None) -> JsonFields | None:
    """Parameters may stand once per layer type; they must then agree."""
    if fields is None:
        return None
    nested = [value for value in fields.fields.values() if isinstance(value, dict)]
    if not nested:
        return fields
    if any(value != nested[0] for value in nested):
        raise config.bad("rope parameters that differ between layer types are not supported")
    return JsonFields(config.path, nested[0])
