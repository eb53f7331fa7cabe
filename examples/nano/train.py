"""Train M3-nano.

    python examples/nano/train.py --output build/nano [--minutes 110] [--seed 0]

Ctrl-C loses at most the minutes since the last checkpoint; the same command goes on from there.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import conversations
import net
import numpy as np
import torch
import vocabulary
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

TOKENS_PER_STEP = 6144
LONGEST = 700
RATE, WARM_UP, DENSE_STEPS = 3e-3, 100, 300


@dataclass
class Batch:
    ids: torch.Tensor
    said: torch.Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer = vocabulary.with_template(vocabulary.train(arguments.seed))
    ids = tokenizer.get_vocab()
    model = net.build(len(ids), ids, arguments.seed)
    print(sum(p.numel() for p in model.parameters()), "parameters,", len(ids), "tokens")
    train(model, conversations.Encoder(tokenizer), arguments)


def train(model: Any, encoder: conversations.Encoder, arguments: argparse.Namespace) -> None:
    lessons = net.Lessons(model)
    optimizer = torch.optim.AdamW(groups(model), lr=RATE, betas=(0.9, 0.98))
    rng = random.Random(arguments.seed)
    model.train()
    begun, log = time.monotonic(), (arguments.output / "log.jsonl").open("a")
    batches = make_batches(encoder, rng)
    seen = 0
    for step in range(arguments.steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * schedule(step, arguments.steps)
        net.attend_densely(model, step < DENSE_STEPS)
        batch = next(batches)
        seen += batch.ids.numel()
        with lessons.of_one_pass(batch.said[:, 1:]) as index_losses:
            logits = model(input_ids=batch.ids[:, :-1]).logits
            wanted = batch.said[:, 1:]
            loss = functional.cross_entropy(logits[wanted], batch.ids[:, 1:][wanted])
            index_loss = sum(index_losses) / len(index_losses)
        optimizer.zero_grad()
        (loss + index_loss).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            line = {
                "step": step,
                "loss": round(loss.item(), 4),
                "index": round(index_loss.item(), 4),
                "seconds": round(time.monotonic() - begun),
                "tokens": seen,
            }
            print(json.dumps(line), flush=True)
            log.write(json.dumps(line) + "\n")
            log.flush()
        if step % 500 == 499:
            torch.save(model.state_dict(), arguments.output / "model.pt")


def groups(model: Any) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]


def schedule(step: int, steps: int) -> float:
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))


def make_batches(encoder: conversations.Encoder, rng: random.Random) -> Iterator[Batch]:
    """Conversations of about the same length together."""
    while True:
        drawn = [conversations.draw(rng, LONGEST, encoder.count) for _ in range(256)]
        encoded = sorted(
            (encoder.encode(cases) for cases in drawn if not cases[0].pictures), key=lambda e: len(e.ids)
        )
        batches, rows = [], []
        for one in encoded:
            rows.append(one)
            if len(rows) * len(one.ids) >= TOKENS_PER_STEP:
                batches.append(pad(rows))
                rows = []
        rng.shuffle(batches)
        yield from batches


def pad(rows: list[conversations.Encoded]) -> Batch:
    length = max(len(row.ids) for row in rows)
    ids, said = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), bool)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)], said[number, : len(row.ids)] = row.ids, row.said
    return Batch(torch.from_numpy(ids), torch.from_numpy(said))


if __name__ == "__main__":
    main()
