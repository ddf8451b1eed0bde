"""Seeded tasks whose answers can be checked: lookup, addition, reversal, JSON fields, free text.

Each generator takes (rng, held_out) and returns an `Example`: chat messages, of which the last is
the assistant's answer. The answer is computed by ordinary code from the same facts as the prompt.
Same seed, same examples; the facts of training and evaluation are disjoint (`words.is_held_out`).
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.train_builtin import free_text, templates
from bench.train_builtin.words import (
    COLORS,
    FIELDS,
    NAMES,
    any_word,
    distinct_words,
    is_held_out,
    word,
)

Message = tuple[str, str]  # (role, content)
Value = str | int | bool | None
_MAX_TRIES = 10_000


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation (`messages`) or, when `completion` is set, plain text to be continued."""

    task: str
    messages: tuple[Message, ...]
    completion: bool = False

    @property
    def answer(self) -> str:
        return self.messages[-1][1]

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    def is_right(self, text: str) -> bool:
        """Exact match, but for surrounding white space."""
        return text.strip() == self.answer.strip()


def _chat(task: str, question: str, answer: str) -> Example:
    return Example(task, (("user", question), ("assistant", answer)))


def _number(rng: random.Random) -> int:
    digits = rng.choice((1, 2, 2, 3, 3, 3, 3))
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def _addends(rng: random.Random, held_out: bool) -> tuple[int, int]:
    """Two numbers; sums of two one-digit numbers are all trained on, being so few."""
    for _ in range(_MAX_TRIES):
        a, b = _number(rng), _number(rng)
        if (is_held_out(f"{a}+{b}") and max(a, b) > 9) == held_out:
            return a, b
    raise AssertionError("the split left no sums")


def add(rng: random.Random, held_out: bool) -> Example:
    """Add two numbers of up to three digits."""
    a, b = _addends(rng, held_out)
    question = rng.choice(templates.ADD).format(a=a, b=b)
    return _chat("add", question, f"{a} + {b} = {a + b}")


def reverse(rng: random.Random, held_out: bool) -> Example:
    """Spell one word backwards, sometimes two or three."""
    if rng.random() < 0.8:
        item = word(rng, held_out=held_out)
        item = item.capitalize() if rng.random() < 0.1 else item
        return _chat("reverse", rng.choice(templates.REVERSE).format(word=item), item[::-1])
    items = [word(rng, held_out=held_out) for _ in range(rng.choice((2, 2, 3)))]
    question = rng.choice(templates.REVERSE_MANY).format(words=", ".join(items))
    return _chat("reverse", question, ", ".join(item[::-1] for item in items))


def _keys(rng: random.Random, count: int) -> list[str]:
    kind = rng.random()
    if kind < 0.75:
        return distinct_words(rng, count)
    if kind < 0.9:
        stem = rng.choice(("key", "item", "k", "box", any_word(rng)))
        return [f"{stem}{i}" for i in rng.sample(range(1, 100), count)]
    return rng.sample([*FIELDS, *COLORS], count) if count <= 20 else distinct_words(rng, count)


def _lookup(
    rng: random.Random, held_out: bool, count: int, task: str, num_asked: int = 1
) -> Example:
    """Find a key in a list of `count` entries, before or after the question; then ask for more."""
    asked: list[int] = []
    while not asked:
        keys = _keys(rng, count)
        if rng.random() < 0.7:
            values = [str(rng.randint(0, 10 ** rng.choice((1, 2, 3)) - 1)) for _ in keys]
        else:
            values = [rng.choice((*COLORS, any_word(rng))) for _ in keys]
        pairs = list(zip(keys, values, strict=True))
        fit = [i for i, (k, v) in enumerate(pairs) if is_held_out(f"{k}={v}") == held_out]
        asked = rng.sample(fit, min(num_asked, len(fit)))
    # In practice with many questions, half of the lists are written as answers are: a model first
    # learns to match those, and then the other styles by analogy.
    easy = num_asked > 3 and rng.random() < 0.5
    between, separator = rng.choice(templates.LIST_STYLES) if not easy else (" = ", ", ")
    listing = separator.join(f"{k}{between}{v}" for k, v in pairs)
    messages: list[Message] = []
    for i in asked:
        pattern = rng.choice(templates.FOLLOW_UP if messages else templates.LOOKUP)
        messages.append(("user", pattern.format(list=listing, key=keys[i])))
        messages.append(("assistant", f"{keys[i]} = {values[i]}"))
    return Example(task, tuple(messages))


def lookup(rng: random.Random, held_out: bool) -> Example:
    """Find a key in a short list, sometimes another one after it."""
    num_asked = rng.choice((1, 1, 1, 1, 2, 3))
    return _lookup(rng, held_out, rng.choice((2, 3, 3, 4, 4, 5, 6, 7, 8)), "lookup", num_asked)


def lookup_long(rng: random.Random, held_out: bool) -> Example:
    """Find a key in a list of 150 to about 550 tokens."""
    return _lookup(rng, held_out, rng.randint(14, 42), "lookup_long")


def _object(rng: random.Random, count: int) -> dict[str, Value]:
    pool = [*FIELDS, *distinct_words(rng, 3)]
    fields: dict[str, Value] = {}
    for key in rng.sample(pool, count * 2):
        if len(fields) == count:
            break
        choices: tuple[Value, ...] = (
            rng.choice(NAMES),
            any_word(rng),
            rng.randint(0, 10 ** rng.choice((1, 2, 3)) - 1),
            rng.choice((True, False, None, rng.choice(COLORS))),
        )
        fields[key] = rng.choice(choices)
    return fields


def _json_turn(rng: random.Random, fields: dict[str, Value]) -> tuple[Message, Message]:
    """A question that holds the object, and its answer."""
    text = json.dumps(fields)
    kind = rng.random()
    if kind < 0.15:
        question = rng.choice(templates.JSON_COPY).format(object=text)
        return ("user", question), ("assistant", text)
    keys = rng.sample(list(fields), 2 if kind < 0.3 else 1)
    pattern = rng.choice(templates.JSON_FIELD if len(keys) == 1 else templates.JSON_TWO_FIELDS)
    question = pattern.format(object=text, key=keys[0], other=keys[-1])
    return ("user", question), ("assistant", json.dumps({key: fields[key] for key in keys}))


def json_field(rng: random.Random, held_out: bool, num_asked: int | None = None) -> Example:
    """Copy one field (or two, or the whole object) of a JSON object, as a JSON object."""
    fields = _object(rng, rng.choice((2, 3, 3, 4, 5)))
    while is_held_out(json.dumps(fields)) != held_out:
        fields = _object(rng, rng.choice((2, 3, 3, 4, 5)))
    messages: list[Message] = list(_json_turn(rng, fields))
    more = rng.choice((1, 1, 1, 1, 2, 3)) if num_asked is None else num_asked
    for key in rng.sample(list(fields), min(more, len(fields)) - 1):
        messages.append(("user", rng.choice(templates.FOLLOW_UP).format(key=key)))
        messages.append(("assistant", json.dumps({key: fields[key]})))
    return Example("json", tuple(messages))


def talk(rng: random.Random, held_out: bool) -> Example:
    """Greetings, questions about the model, and a fixed reply to what it was not trained for."""
    for _ in range(_MAX_TRIES):
        question, answer = free_text.sample(rng)
        if is_held_out(question) == held_out:
            return _chat("free_text", question, answer)
    raise AssertionError("the split left no questions")


Generator = Callable[[random.Random, bool], Example]
GENERATORS: dict[str, Generator] = {
    "lookup": lookup,
    "add": add,
    "reverse": reverse,
    "json": json_field,
    "free_text": talk,
    "lookup_long": lookup_long,
}


def with_system(rng: random.Random, example: Example) -> Example:
    """The same conversation under a system prompt, which changes nothing."""
    system = rng.choice(free_text.SYSTEM_PROMPTS)
    return Example(example.task, (("system", system), *example.messages))


def conversation(rng: random.Random, held_out: bool, num_turns: int) -> Example:
    """Several short tasks in a row; the last one gives the name."""
    names = ("lookup", "add", "reverse", "json", "free_text")
    turns = [GENERATORS[rng.choice(names)](rng, held_out) for _ in range(num_turns)]
    return Example("multi_turn", tuple(m for turn in turns for m in turn.messages))


def completion(rng: random.Random, held_out: bool) -> Example:
    """Plain text without chat roles: one or more lines of the same shape, the last one asked."""
    shape = rng.randrange(3)
    lines: list[Message] = []
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        if shape == 0:
            a, b = _addends(rng, held_out)
            lines.append((f"{a} + {b} =", f" {a + b}"))
        elif shape == 1:
            item = word(rng, held_out=held_out)
            lines.append((f"reverse {item} ->", f" {item[::-1]}"))
        else:
            turn = talk(rng, held_out).messages
            lines.append((f"Q: {turn[0][1]}\nA:", f" {turn[1][1]}"))
    done = "".join(f"{q}{a}\n" for q, a in lines[:-1])
    question, answer = lines[-1]
    return Example("completion", (("user", done + question), ("assistant", answer)), True)


def drill(rng: random.Random, held_out: bool, name: str, num_turns: int) -> Example:
    """Several turns of one task: much practice in few tokens."""
    if name == "lookup":
        return _lookup(rng, held_out, rng.randint(2, 6), name, num_turns)
    if name == "lookup_long":
        return _lookup(rng, held_out, rng.randint(12, 40), name, num_turns + 3)
    if name == "json":
        return json_field(rng, held_out, num_turns)
    turns = [GENERATORS[name](rng, held_out) for _ in range(num_turns)]
    return Example(name, tuple(m for turn in turns for m in turn.messages))


def training_example(rng: random.Random, shares: dict[str, float]) -> Example:
    """One training example; `shares` gives each task's weight."""
    name = rng.choices(list(shares), list(shares.values()))[0]
    if name == "multi_turn":
        example = conversation(rng, False, rng.choice((2, 2, 3, 4)))
    elif name == "completion":
        return completion(rng, False)
    elif name.endswith("_drill"):
        example = drill(rng, False, name.removesuffix("_drill"), rng.randint(3, 6))
    else:
        example = GENERATORS[name](rng, False)
    return with_system(rng, example) if rng.random() < 0.12 else example


def held_out_examples(name: str, seed: int, count: int) -> Iterator[Example]:
    """`count` examples of one task, none of whose facts were trained on."""
    rng = random.Random(f"{name}/{seed}")
    for _ in range(count):
        if name == "multi_turn":
            yield conversation(rng, True, rng.choice((2, 2, 3)))
        elif name == "completion":
            yield completion(rng, True)
        else:
            example = GENERATORS[name](rng, True)
            yield with_system(rng, example) if rng.random() < 0.12 else example
