"""Exact match per task on held-out prompts, by greedy decoding with the training model."""

import torch
import torch.nn.functional as F

from bench.train_builtin import model, tokenizer
from bench.train_builtin.batches import Encoder
from bench.train_builtin.tasks import Example, held_out_examples

Miss = tuple[Example, str]


@torch.no_grad()
def generate(
    shape: model.ModelShape,
    weights: model.Weights,
    encoder: Encoder,
    prompts: list[list[int]],
    limit: int,
) -> list[list[int]]:
    """Greedy continuations of right-padded prompts, each until the end token or `limit` tokens."""
    end, pad = encoder.special(tokenizer.END), encoder.special(tokenizer.PAD)
    rope = model.rope_table(shape, shape.max_len)
    rows = [list(p) for p in prompts]
    live = list(range(len(rows)))
    for _ in range(limit):
        width = max(len(rows[i]) for i in live)
        ids = torch.tensor([rows[i] + [pad] * (width - len(rows[i])) for i in live])
        hidden = model.forward(shape, weights, ids, rope)
        last = torch.tensor([len(rows[i]) - 1 for i in live])
        logits = F.linear(hidden[torch.arange(len(live)), last].float(), weights["embed"])
        for i, token_id in zip(list(live), logits.argmax(-1).tolist(), strict=True):
            rows[i].append(token_id)
            if token_id == end or len(rows[i]) >= shape.max_len:
                live.remove(i)
        if not live:
            break
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def accuracy(
    shape: model.ModelShape,
    weights: model.Weights,
    encoder: Encoder,
    name: str,
    seed: int,
    count: int,
) -> tuple[float, list[Miss]]:
    """Share of exactly right answers, and the wrong ones."""
    examples = list(held_out_examples(name, seed, count))
    examples.sort(key=lambda e: len(encoder.prompt(e)))
    misses: list[Miss] = []
    for start in range(0, count, 64):
        part = examples[start : start + 64]
        limit = max(len(encoder.text(e.answer)) for e in part) + 2
        outputs = generate(shape, weights, encoder, [encoder.prompt(e) for e in part], limit)
        for example, ids in zip(part, outputs, strict=True):
            text = encoder.tokenizer.decode(ids, skip_special_tokens=True)
            if not example.is_right(text):
                misses.append((example, text))
    return 1 - len(misses) / count, misses
