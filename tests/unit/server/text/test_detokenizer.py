"""Incremental text equals the library's decoding of the whole sequence."""

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.server.text.tokenizer import Tokenizer
from tests.support.tokenizers_small import write_byte_fallback, write_byte_level, write_metaspace

Pair = tuple[Tokenizer, tokenizers.Tokenizer]


def _pair(folder: Path) -> Pair:
    return Tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return _pair(write_byte_level(tmp_path_factory.mktemp("bl")))


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return _pair(write_byte_fallback(tmp_path_factory.mktemp("bf")))


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return _pair(write_metaspace(tmp_path_factory.mktemp("ms")))


def _parts(tokenizer: Tokenizer, ids: list[int], skip: bool) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 420), max_size=40), skip=st.booleans())
def test_byte_level_any_ids(byte_level: Pair, ids: list[int], skip: bool) -> None:
    """Random ids give mostly broken UTF-8, and ids beyond the vocabulary."""
    ours, library = byte_level
    expected = library.decode(ids, skip_special_tokens=skip)
    assert (
        "".join(_parts(ours, ids, skip)) == expected == ours.decode(ids, skip_special_tokens=skip)
    )


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_byte_level_text(byte_level: Pair, text: str) -> None:
    ours, _ = byte_level
    parts = _parts(ours, ours.encode(text, add_special_tokens=False), True)
    assert "".join(parts) == text
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="the hello é数🙂,  ", max_size=40), skip=st.booleans())
def test_byte_fallback_text(byte_fallback: Pair, text: str, skip: bool) -> None:
    ours, library = byte_fallback
    ids = ours.encode(text)
    assert "".join(_parts(ours, ids, skip)) == library.decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(259, 290), max_size=20), skip=st.booleans())
def test_byte_fallback_any_merges(byte_fallback: Pair, ids: list[int], skip: bool) -> None:
    ours, library = byte_fallback
    assert "".join(_parts(ours, ids, skip)) == library.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(1, 32), max_size=30), skip=st.booleans())
def test_window_any_ids(metaspace: Pair, ids: list[int], skip: bool) -> None:
    ours, library = metaspace
    assert not ours.pieces.exact
    assert "".join(_parts(ours, ids, skip)) == library.decode(ids, skip_special_tokens=skip)


def test_half_characters_wait(byte_level: Pair) -> None:
    ours, _ = byte_level
    ids = [ours.encode(chr(0x1F600 + i), add_special_tokens=False) for i in range(3)]
    flat = [token for part in ids for token in part]
    shown = [part for part in _parts(ours, flat, True) if part]
    assert shown == ["😀", "😁", "😂"]
    assert "".join(_parts(ours, flat[:-1], True)) == "😀😁\ufffd"


def test_spaces_between_special_tokens(metaspace: Pair) -> None:
    ours, library = metaspace
    end = library.token_to_id("</s>")
    the = library.token_to_id("▁the")
    ids = [the, end, end, the]
    options = {"skip_special_tokens": False, "spaces_between_special_tokens": False}
    assert "</s></s>" in ours.decode(ids, **options)
