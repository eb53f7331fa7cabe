"""Train M3-nano.

    python examples/nano/train.py build/nano [--steps 4000] [--seed 0]

Ctrl-C loses at most the steps since the last checkpoint (a few minutes); the same command goes on from there.
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import conversations
import mlx_vlm.models.minimax_m3_vl  # noqa: F401 (with it come the processors)
import net
import numpy as np
import torch
import vocabulary
from mlx_vlm.utils import load_processor
from tokenizers import Tokenizer
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

TOKENS_PER_STEP = 6144
# Of hay, in tokens: eight block budgets and some more.
LONGEST = 9 * net.BLOCK * net.TOP_K
RATE, LEAST_RATE, WARM_UP = 3e-3, 0.03, 100
# As long as attention is dense the indexers learn to rank blocks that all are attended to.
DENSE_STEPS = 400
POOL, LOG_EVERY, SAVE_EVERY = 384, 20, 100


@dataclass
class Batch:
    """Rows ``[B, L]`` padded on the right, and the pixel values and grids of their pictures."""

    ids: torch.Tensor
    said: torch.Tensor
    pictures: dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    directory = arguments.directory
    encoder = make_encoder(directory, arguments.seed)
    ids = encoder.tokenizer.get_vocab()
    model = net.build(len(ids), ids, arguments.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(ids)} tokens")
    Training(model, encoder, directory, arguments.steps, arguments.seed).run()


def make_encoder(directory: Path, seed: int) -> conversations.Encoder:
    """With the tokenizer that is there, or a new one."""
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "tokenizer.json").exists():
        vocabulary.save(vocabulary.train(seed), directory)
        (directory / "config.json").write_text(json.dumps({"model_type": "minimax_m3_vl"}))
    tokenizer = vocabulary.with_template(Tokenizer.from_file(str(directory / "tokenizer.json")))
    return conversations.Encoder(tokenizer, load_processor(directory))


class Training:
    """The state of a training, and its steps."""

    def __init__(self, model: Any, encoder: conversations.Encoder, directory: Path, steps: int, seed: int):
        self.model, self.encoder, self.directory, self.steps, self.seed = (
            model,
            encoder,
            directory,
            steps,
            seed,
        )
        self.lessons = net.Lessons(model)
        self.optimizer = torch.optim.AdamW(_groups(model), lr=RATE, betas=(0.9, 0.98))
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        if self.checkpoint.exists():
            self._load(torch.load(self.checkpoint, weights_only=True))

    @property
    def checkpoint(self) -> Path:
        return self.directory / "checkpoint.pt"

    def run(self) -> None:
        self.model.train()
        begun, before = time.monotonic(), self.seconds
        # A stream of its own for every start: going on does not repeat what was seen.
        batches = make_batches(self.encoder, random.Random(f"{self.seed} from {self.step}"))
        while self.step < self.steps:
            losses = self.one_step(next(batches))
            self.seconds = before + time.monotonic() - begun
            if self.step % LOG_EVERY == 0:
                self._log(losses)
            if self.step % SAVE_EVERY == 0 or self.step == self.steps:
                self._save()

    def one_step(self, batch: Batch) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * _schedule(self.step, self.steps)
        net.attend_densely(self.model, self.step < DENSE_STEPS)
        wanted = batch.said[:, 1:]
        with self.lessons.of_one_pass(wanted) as index_losses:
            logits = self.model(input_ids=batch.ids[:, :-1], **batch.pictures).logits
            loss = functional.cross_entropy(logits[wanted], batch.ids[:, 1:][wanted])
            index_loss = torch.stack(index_losses).mean()
        self.optimizer.zero_grad()
        (loss + index_loss).backward()
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.tokens += batch.ids.numel()
        return {"loss": loss.item(), "index": index_loss.item()}

    def _log(self, losses: dict[str, float]) -> None:
        line = {"step": self.step, "seconds": round(self.seconds), "tokens": self.tokens}
        line |= {name: round(value, 4) for name, value in losses.items()}
        print(json.dumps(line), flush=True)
        with (self.directory / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def _save(self) -> None:
        state = {name: getattr(self, name) for name in ("step", "seconds", "tokens")}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        unfinished = self.checkpoint.with_suffix(".unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, self.checkpoint)

    def _load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.tokens = state["step"], state["seconds"], state["tokens"]


def _groups(model: Any) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]


def _schedule(step: int, steps: int) -> float:
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return LEAST_RATE + (1 - LEAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / steps))


def make_batches(encoder: conversations.Encoder, rng: random.Random) -> Iterator[Batch]:
    """Conversations of about the same length together, and those with the same kind of pictures."""
    while True:
        drawn = [conversations.draw(rng, LONGEST, encoder.count) for _ in range(POOL)]
        pool = [encoder.encode(cases) for cases in drawn]
        pool.sort(key=lambda one: (sorted(one.pictures), len(one.ids)))
        batches, rows = [], pool[:1]
        for one in pool[1:]:
            full = (len(rows) + 1) * len(one.ids) > TOKENS_PER_STEP
            if full or one.pictures.keys() != rows[0].pictures.keys():
                batches.append(rows)
                rows = []
            rows.append(one)
        batches.append(rows)
        rng.shuffle(batches)
        yield from map(_batch, batches)


def _batch(rows: list[conversations.Encoded]) -> Batch:
    length = max(len(row.ids) for row in rows)
    ids, said = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), bool)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)], said[number, : len(row.ids)] = row.ids, row.said
    pictures = {
        name: torch.from_numpy(np.concatenate([row.pictures[name] for row in rows]))
        for name in rows[0].pictures
    }
    return Batch(torch.from_numpy(ids), torch.from_numpy(said), pictures)


if __name__ == "__main__":
    main()
