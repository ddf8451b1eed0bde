"""Model names become folders, or refusals that say what to do; no test asks the hub itself."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from diptych.engine.core.errors import ModelLoadError
from diptych.engine.hub import resolve_model


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert resolve_model(f"~/{tmp_path.name}") == str(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    assert resolve_model(tmp_path.name) == tmp_path.name


@pytest.mark.parametrize("name", ["/no/such", "./no", "../no", "~/no", "a/b/c", ""])
def test_what_looks_like_a_path_is_not_downloaded(name: str) -> None:
    with pytest.raises(ModelLoadError, match="there is no such folder"):
        resolve_model(name)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(ModelLoadError, match="is a file"):
        resolve_model(str(path))


def test_a_hub_name_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str], list[str]]] = []

    def snapshot(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((name, allow_patterns, ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("someone/small") == str(tmp_path)
    ((name, allowed, _),) = asked
    assert name == "someone/small"
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in allowed if "." in pattern)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LocalEntryNotFoundError("offline"), "the hub cannot be reached"),
        (OSError("disk full"), "disk full"),
    ],
)
def test_a_failed_download_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def snapshot(name: str, **_: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError, match=reason):
        resolve_model("someone/small")


def test_an_impossible_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError, match="neither a folder nor a hub name"):
        resolve_model("not a name!")
