"""From what a user calls a model to a local folder: a path as it is, a hub name by download.

Owns no state; the hub's own cache does. Torch-free, so that every process can resolve a name.
Invariant: only data is fetched (safetensors, JSON, tokenizer), never code.
"""

from pathlib import Path
from typing import Final

from diptych.engine.core.errors import ModelLoadError

_WANTED: Final = ["*.safetensors", "*.json", "tokenizer*", "*.jinja"]
_UNWANTED: Final = ["consolidated*", "original/*"]  # the same weights in another layout


def resolve_model(name_or_path: str) -> str:
    """The folder of a model: `name_or_path` itself where it is one, else the hub's snapshot.

    Raises ModelLoadError: no such folder, no such repository, or no network.
    """
    path = Path(name_or_path).expanduser()
    if name_or_path and path.is_dir():
        return str(path)
    if path.is_file():
        raise ModelLoadError(f"{path}: is a file; give the folder that holds config.json")
    looks_local = name_or_path.startswith(("/", ".", "~")) or name_or_path.count("/") > 1
    if looks_local or not name_or_path:
        raise ModelLoadError(f"{name_or_path!r}: there is no such folder")
    return _download(name_or_path)


def _download(name: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        return str(snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except HFValidationError as error:
        raise ModelLoadError(f"{name!r}: neither a folder nor a hub name ({error})") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelLoadError(
            f"{name!r}: is no local folder, is not in the hub's cache, and the hub cannot be"
            " reached; download it elsewhere and give the folder"
        ) from error
    except HfHubHTTPError as error:
        raise ModelLoadError(f"{name!r}: the hub refused it ({error})") from error
    except OSError as error:
        raise ModelLoadError(f"{name!r}: download failed ({error})") from error
