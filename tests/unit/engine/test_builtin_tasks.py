"""The built-in model's training tasks, tokenizer and chat template.

Answers are recomputed here from the prompt text alone, by other means than the generators'.
"""

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from bench.train_builtin import batches, tasks, tokenizer
from bench.train_builtin.tasks import Example

SEED = 7
COUNT = 150
ENCODER = batches.Encoder(tokenizer.build())


def examples(name: str, seed: int = SEED) -> list[Example]:
    return list(tasks.held_out_examples(name, seed, COUNT))


def question(example: Example) -> str:
    return example.prompt[-1][1]


@pytest.mark.parametrize("name", [*tasks.GENERATORS, "multi_turn", "completion"])
def test_same_seed_gives_same_examples(name: str) -> None:
    assert examples(name) == examples(name)
    assert examples(name) != examples(name, SEED + 1)


def test_training_examples_depend_on_the_seed_alone() -> None:
    shares = {"add_drill": 1.0, "lookup": 1.0, "multi_turn": 1.0, "completion": 1.0, "json": 1.0}

    def draw() -> list[Example]:
        rng = random.Random(SEED)
        return [tasks.training_example(rng, shares) for _ in range(COUNT)]

    assert draw() == draw()


def test_sums_are_right() -> None:
    for example in examples("add"):
        a, b = (int(n) for n in re.findall(r"\d+", question(example)))
        assert example.is_right(f"{a} + {b} = {a + b}\n"), (SEED, example)
        assert not example.is_right(f"{a} + {b} = {a + b + 1}")


def test_reversed_words_are_in_the_prompt() -> None:
    for example in examples("reverse"):
        for item in example.answer.split(", "):
            assert "".join(reversed(item)) in question(example), (SEED, example)


@pytest.mark.parametrize("name", ["lookup", "lookup_long"])
def test_looked_up_entries_are_in_the_list_and_unique(name: str) -> None:
    for example in examples(name):
        key, value = example.answer.split(" = ")
        entry = rf"(?<!\w){re.escape(key)}(?:=| = |: |:| is | -> )(\w+)"
        listing = next(text for role, text in example.messages if role == "user")
        assert value in re.findall(entry, listing), (SEED, example)


def test_json_answers_are_fields_of_the_object() -> None:
    for example in examples("json"):
        listing = next(text for role, text in example.messages if role == "user")
        found = re.search(r"\{.*\}", listing)
        assert found is not None
        whole, part = json.loads(found.group()), json.loads(example.answer)
        assert part, (SEED, example)
        assert part.items() <= whole.items(), (SEED, example)


def test_training_never_sees_a_held_out_sum() -> None:
    rng = random.Random(SEED)
    trained = {tasks.add(rng, False).answer for _ in range(2000)}
    asked = {e.answer for e in examples("add")}
    assert not trained & asked, f"seed {SEED}"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_round_trips(text: str) -> None:
    ids = ENCODER.text(text)
    assert ENCODER.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_digits_and_unknown_words_are_single_characters() -> None:
    ids = ENCODER.text("What is 345?")
    tokens = [ENCODER.tokenizer.id_to_token(i) for i in ids]
    assert tokens == ["What", "\u0120is", "\u0120", "3", "4", "5", "?"]
    assert len(ENCODER.text("'planet'")) == len("'planet'")
    assert ENCODER.tokenizer.get_vocab_size() <= 1024


def test_chat_template_renders_all_roles() -> None:
    fast = tokenizer.build_fast(1024)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 3"},
        {"role": "assistant", "content": "2 + 3 = 5"},
        {"role": "user", "content": [{"type": "text", "text": "Thanks"}]},
    ]
    text = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|system|>Be brief.<|end|><|user|>2 + 3<|end|><|assistant|>2 + 3 = 5<|end|>"
        "<|user|>Thanks<|end|><|assistant|>"
    )
    with pytest.raises(Exception, match="Only system"):
        fast.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_training_rows_equal_the_chat_template() -> None:
    example = next(tasks.held_out_examples("multi_turn", SEED, 1))
    messages = [{"role": role, "content": content} for role, content in example.messages]
    rendered = tokenizer.build_fast(1024).apply_chat_template(messages, tokenize=False)
    ids, targets = ENCODER.row(example, num_bos=1)
    assert ids == ENCODER.text(rendered)[:-1]
    assert ENCODER.prompt(example) == ids[: len(ENCODER.prompt(example))]
    said = [t for t in targets if t != batches.IGNORED]
    expected = [
        token
        for role, content in example.messages
        if role == "assistant"
        for token in (*ENCODER.text(content), ENCODER.special(tokenizer.END))
    ]
    assert said == expected


def test_shipped_folder_is_complete_small_and_has_this_tokenizer() -> None:
    folder = Path(__file__).resolve().parents[3] / "server" / "builtin_model"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= sizes.keys()
    assert sum(sizes.values()) <= 12_000_000
    shipped = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert json.loads(shipped.to_str()) == json.loads(ENCODER.tokenizer.to_str())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["chat_template"] == tokenizer.CHAT_TEMPLATE
