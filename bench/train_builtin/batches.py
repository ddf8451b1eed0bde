"""From examples to padded batches of token ids, with targets on the answers only.

Owns nothing. The examples of a step depend on (seed, step) alone, so a resumed run continues with
exactly the data the interrupted one would have seen.
"""

import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from bench.train_builtin import tokenizer as tok
from bench.train_builtin.tasks import Example, training_example

IGNORED = -100
Row = tuple[list[int], list[int]]  # (token ids, targets), of the same length


@dataclass(frozen=True, slots=True)
class Encoder:
    """Turns examples into token ids with the tokenizer's special tokens."""

    tokenizer: Tokenizer

    def special(self, name: str) -> int:
        token_id = self.tokenizer.token_to_id(name)
        assert token_id is not None, name
        return int(token_id)

    def text(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def prompt(self, example: Example) -> list[int]:
        """Token ids up to where the model starts to write."""
        if example.completion:
            return [self.special(tok.BOS), *self.text(example.prompt[0][1])]
        ids = [self.special(tok.BOS)]
        for role, content in example.prompt:
            ids += [self.special(f"<|{role}|>"), *self.text(content), self.special(tok.END)]
        return [*ids, self.special(tok.ASSISTANT)]

    def row(self, example: Example, num_bos: int) -> Row:
        """Inputs and next-token targets; only what the assistant says has a target."""
        ids = [self.special(tok.BOS)] * num_bos
        wanted = [False] * num_bos
        for role, content in example.messages:
            said = role == "assistant"
            if not example.completion:
                ids.append(self.special(f"<|{role}|>"))
                wanted.append(False)
            body = self.text(content)
            if said or not example.completion:
                body.append(self.special(tok.END))
            ids += body
            wanted += [said] * len(body)
        targets = [t if w else IGNORED for t, w in zip(ids[1:], wanted[1:], strict=True)]
        return ids[:-1], targets


def step_rows(
    encoder: Encoder, seed: int, step: int, shares: dict[str, float], num_tokens: int, max_len: int
) -> list[Row]:
    """The rows of one step, about `num_tokens` tokens together, shortest first."""
    rng = random.Random(f"{seed}/{step}")
    rows: list[Row] = []
    total = 0
    while total < num_tokens:
        num_bos = rng.choices((1, 0, 2), (0.9, 0.05, 0.05))[0]
        row = encoder.row(training_example(rng, shares), num_bos)
        if len(row[0]) <= max_len:
            rows.append(row)
            total += len(row[0])
    return sorted(rows, key=lambda row: len(row[0]))


def micro_batches(rows: list[Row], pad_id: int, num_tokens_max: int) -> list[tuple[Tensor, Tensor]]:
    """(ids, targets), each [B, T] int64, of neighbouring lengths and at most `num_tokens_max`."""
    groups: list[list[Row]] = []
    for row in rows:
        if groups and (len(groups[-1]) + 1) * len(row[0]) <= num_tokens_max:
            groups[-1].append(row)
        else:
            groups.append([row])
    batches = []
    for group in groups:
        width = max(len(ids) for ids, _ in group)
        ids = [ids + [pad_id] * (width - len(ids)) for ids, _ in group]
        targets = [t + [IGNORED] * (width - len(t)) for _, t in group]
        batches.append((torch.tensor(ids), torch.tensor(targets)))
    return batches
