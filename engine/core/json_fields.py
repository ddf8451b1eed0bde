"""A JSON file of a model folder, read field by field with checked types.

Owns nothing but the parsed object. Invariant: every complaint is a ModelLoadError that names the
file, the field and what stood there. A field that is null counts as absent, as in transformers.
"""

import json
import math
from pathlib import Path
from typing import Final

from diptych.engine.core.errors import ModelLoadError

_JSON_BYTES_MAX: Final = 16 << 20


class JsonFields:
    """The fields of one JSON object; `path` is for messages."""

    __slots__ = ("fields", "path")

    def __init__(self, path: Path, fields: dict[str, object]) -> None:
        self.path = path
        self.fields = fields

    @classmethod
    def read(cls, path: Path) -> "JsonFields":
        """Raises ModelLoadError when the file is missing, too big, or holds no JSON object."""
        try:
            if path.stat().st_size > _JSON_BYTES_MAX:
                raise ModelLoadError(f"{path}: larger than {_JSON_BYTES_MAX} bytes")
            value = json.loads(path.read_bytes())
        except OSError as error:
            raise ModelLoadError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise ModelLoadError(f"{path}: is no valid JSON ({error})") from error
        if not isinstance(value, dict):
            raise ModelLoadError(f"{path}: must hold a JSON object")
        return cls(path, value)

    def bad(self, reason: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path}: {reason}")

    def has(self, name: str) -> bool:
        return self.fields.get(name) is not None

    def get(self, name: str) -> object:
        return self.fields.get(name)

    def integer(
        self, name: str, default: int | None = None, *, low: int = 1, high: int = 2**31 - 1
    ) -> int:
        value = self.fields.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.bad(f"{name} is missing")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.bad(f"{name} must be an integer in [{low}, {high}], got {value!r}")
        return value

    def number(self, name: str, default: float | None = None, *, positive: bool = True) -> float:
        value = self.fields.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.bad(f"{name} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.bad(f"{name} must be a number, got {value!r}")
        if not math.isfinite(value) or (positive and value <= 0):
            raise self.bad(f"{name} must be finite and above 0, got {value!r}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.fields.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.bad(f"{name} must be true or false, got {value!r}")
        return value

    def text(self, name: str) -> str | None:
        value = self.fields.get(name)
        if value is None or isinstance(value, str):
            return value
        raise self.bad(f"{name} must be a string, got {value!r}")

    def texts(self, name: str) -> list[str] | None:
        value = self.fields.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.bad(f"{name} must be a list of strings, got {value!r}")
        return [str(item) for item in value]

    def child(self, name: str) -> "JsonFields | None":
        """The object in field `name`, None when absent or empty."""
        value = self.fields.get(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.bad(f"{name} must be an object, got {value!r}")
        return JsonFields(self.path, value)

    def token_ids(self, name: str) -> list[int]:
        """One token id or a list of them; empty when absent."""
        value = self.fields.get(name)
        items: list[object] = value if isinstance(value, list) else [value]
        ids: list[int] = []
        for token in items if value is not None else []:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise self.bad(f"{name} must be a token id or a list of them, got {value!r}")
            ids.append(token)
        return ids
