"""The tokenizer against the library and transformers, and its refusals."""

import json
from pathlib import Path

import pytest
import tokenizers

from diptych.engine.core.errors import InvalidRequestError, ModelLoadError
from diptych.server.text.tokenizer import Tokenizer
from tests.support.tokenizers_small import (
    CHAT_TEMPLATE,
    write_byte_fallback,
    write_byte_level,
    write_metaspace,
)

TEXTS = ["hello the world", " the  lazy\n\tdog", "naïve 数字 🙂", "", "<|end|>x"]


@pytest.mark.parametrize("write", [write_byte_level, write_byte_fallback, write_metaspace])
def test_encode_equals_the_library(tmp_path: Path, write) -> None:  # type: ignore[no-untyped-def]
    folder = write(tmp_path / "m")
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer(folder)
    for text in TEXTS:
        for special in (True, False):
            expected = library.encode(text, add_special_tokens=special).ids
            assert tokenizer.encode(text, add_special_tokens=special) == expected


@pytest.mark.parametrize("write", [write_byte_level, write_byte_fallback])
def test_equals_transformers(tmp_path: Path, write) -> None:  # type: ignore[no-untyped-def]
    transformers = pytest.importorskip("transformers")
    folder = write(tmp_path / "m")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = Tokenizer(folder)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello  "},
        {"role": "assistant", "content": "the wor "},
    ]
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    for options in (
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "continue_final_message": True},
    ):
        expected = theirs.apply_chat_template(messages, tokenize=False, **options)
        assert ours.render_chat(messages, **options) == expected


def test_pieces(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_byte_level(tmp_path))
    ids = tokenizer.encode("🙂 é", add_special_tokens=False)
    assert b"".join(tokenizer.pieces[token] for token in ids) == "🙂 é".encode()
    assert tokenizer.pieces.text(1) == "<|end|>"
    assert tokenizer.pieces[10**6] == b""


def test_template_file_wins_and_lists_work(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "tool_use", "template": "no"},
        {"name": "default", "template": "{{ bos_token }}list"},
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer(folder).render_chat([]) == "<|bos|>list"
    (folder / "chat_template.jinja").write_text("{{ messages | tojson }}")
    assert Tokenizer(folder).render_chat([{"a": "<é>"}]) == '[{"a": "<é>"}]'
    (tmp_path / "own.jinja").write_text("own {{ strftime_now('%Y') }}")
    assert Tokenizer(folder, tmp_path / "own.jinja").render_chat([]).startswith("own 2")


def test_no_template(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer(folder)
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match="--chat-template"):
        tokenizer.render_chat([])


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system role') }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages[5].content }}",
        "{{ 'x' + 1 }}",
        "{{ messages.append(1) }}",
    ],
)
def test_hostile_or_broken_templates_are_refused(tmp_path: Path, template: str) -> None:
    folder = write_byte_level(tmp_path)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(InvalidRequestError, match="chat template failed"):
        Tokenizer(folder).render_chat([{"role": "user", "content": "x"}])


def test_generation_tag_and_loop_controls(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% break %}{% endfor %}"
    )
    assert Tokenizer(folder).render_chat([{"content": "a"}, {"content": "b"}]) == "a"


def test_reserved_template_arguments_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_byte_level(tmp_path))
    assert CHAT_TEMPLATE
    with pytest.raises(InvalidRequestError, match="messages cannot be set"):
        tokenizer.render_chat([], arguments={"messages": []})


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json is missing"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(tmp_path)
    write_byte_level(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ModelLoadError, match="chat template"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(b"\xff")
    with pytest.raises(ModelLoadError, match=r"tokenizer_config\.json"):
        Tokenizer(tmp_path)


def test_lone_surrogate_is_a_bad_request(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError):
        Tokenizer(write_byte_level(tmp_path)).encode("a\ud800b")
