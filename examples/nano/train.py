"""Train M3-nano.

    python examples/nano/train.py build/nano [--steps 6500] [--seed 0]

Ctrl-C loses at most the steps since the last checkpoint (a few minutes).  The same command goes on from
there, and ends with the weights of a training that nothing interrupted.
"""

import argparse
import json
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import conversations
import mlx_vlm.models.minimax_m3_vl  # noqa: F401 (with it come the processors)
import net
import numpy as np
import torch
import vocabulary
from mlx_vlm.utils import load_processor
from muon import Muon
from tokenizers import Tokenizer
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

TOKENS_PER_STEP = 3072
RATE, LEAST_RATE, WARM_UP = 8e-3, 0.02, 60
# What the text of prompts counts for, beside what the model is to say.
PROMPT_WEIGHT = 0.1
DECAY = 0.05
# The share of steps with dense attention; meanwhile the indexers learn to rank blocks that all attend to.
DENSE = 0.3
# The share of steps until exercises have their full difficulty.
LEARNER = 0.4
POOL, LOG_EVERY, SAVE_EVERY = 192, 20, 200


@dataclass
class Batch:
    """Rows ``[B, L]`` padded on the right: ids, which of them are the model's to say, and which no padding.

    With them each row's task, and the pixel values and grids of all their pictures.
    """

    ids: torch.Tensor
    said: torch.Tensor
    real: torch.Tensor
    tasks: list[str]
    pictures: dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=6500)
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
        self.model, self.encoder, self.directory = model, encoder, directory
        self.steps, self.seed = steps, seed
        self.lessons = net.Lessons(model)
        self.optimizers = make_optimizers(model)
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.recent: dict[str, list[float]] = defaultdict(list)
        if self.checkpoint.exists():
            self._load(torch.load(self.checkpoint, weights_only=True))

    @property
    def checkpoint(self) -> Path:
        return self.directory / "checkpoint.pt"

    @property
    def log(self) -> Path:
        return self.directory / "log.jsonl"

    def run(self) -> None:
        self.model.train()
        while self.step < self.steps:
            self._run_to_checkpoint()

    def _run_to_checkpoint(self) -> None:
        """All that is drawn depends on the seed and the step it begins at, so one may stop and go on."""
        begun, before = time.monotonic(), self.seconds
        rng = random.Random(f"{self.seed} from {self.step}")
        torch.manual_seed(rng.getrandbits(63))
        end = min(self.steps, (self.step // SAVE_EVERY + 1) * SAVE_EVERY)
        for batch in islice(make_batches(self.encoder, rng, self.difficulty), end - self.step):
            self.one_step(batch)
            self.seconds = before + time.monotonic() - begun
            if self.step % LOG_EVERY == 0:
                self._log()
        self._save()

    def difficulty(self) -> float:
        return min(1.0, self.step / (LEARNER * self.steps))

    def one_step(self, batch: Batch) -> None:
        net.attend_densely(self.model, self.step < DENSE * self.steps)
        asked = batch.said[:, 1:]
        with self.lessons.of_one_pass(asked) as index_losses:
            logits = self.model(input_ids=batch.ids[:, :-1], **batch.pictures).logits
        losses = functional.cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
        losses = losses.view_as(asked)
        index_loss = torch.stack(index_losses).mean()
        prompt_loss = losses[batch.real[:, 1:] & ~asked].mean()
        (losses[asked].mean() + PROMPT_WEIGHT * prompt_loss + index_loss).backward()
        clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = RATE * _schedule(self.step, self.steps)
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.tokens += int(batch.real.sum())
        for task, row, said in zip(batch.tasks, losses.detach(), asked, strict=True):
            self.recent[task].append(row[said].mean().item())
        self.recent["index"].append(index_loss.item())
        self.recent["prompt"].append(prompt_loss.item())

    def _log(self) -> None:
        """Means of what was seen since the last line."""
        line = {"step": self.step, "seconds": round(self.seconds), "tokens": self.tokens}
        line |= {name: round(sum(seen) / len(seen), 4) for name, seen in sorted(self.recent.items())}
        self.recent.clear()
        print(json.dumps(line), flush=True)
        with self.log.open("a") as log:
            log.write(json.dumps(line) + "\n")

    def _save(self) -> None:
        state = {name: getattr(self, name) for name in ("step", "seconds", "tokens")}
        state["model"] = self.model.state_dict()
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        unfinished = self.checkpoint.with_suffix(".unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, self.checkpoint)

    def _load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.tokens = state["step"], state["seconds"], state["tokens"]
        # Steps after the checkpoint will be logged again.
        lines = self.log.read_text().splitlines(keepends=True)
        self.log.write_text("".join(line for line in lines if json.loads(line)["step"] <= self.step))


def make_optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Muon for all matrices but those of the vocabulary, AdamW for all else.

    By AdamW at this rate the patches' kernel, which reads 1,176 numbers, learns colours and never a shape.
    """
    inner, ends, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            vectors.append(parameter)
        else:
            (ends if "embed_tokens" in name or "lm_head" in name else inner).append(parameter)
    others = [{"params": ends, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return [Muon(inner, RATE, DECAY), torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.98))]


def _schedule(step: int, steps: int) -> float:
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return LEAST_RATE + (1 - LEAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / steps))


def make_batches(
    encoder: conversations.Encoder, rng: random.Random, difficulty: Callable[[], float]
) -> Iterator[Batch]:
    """Conversations of about the same length together, and those with the same kind of pictures."""
    while True:
        pool = [_drawn(encoder, rng, difficulty()) for _ in range(POOL)]
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


def _drawn(encoder: conversations.Encoder, rng: random.Random, difficulty: float) -> conversations.Encoded:
    cases = conversations.draw(rng, difficulty, encoder.count)
    return encoder.encode(cases, preamble=not conversations.leaves_out_preamble(rng, difficulty))


def _batch(rows: list[conversations.Encoded]) -> Batch:
    length = max(len(row.ids) for row in rows)
    ids = np.zeros((len(rows), length), np.int64)
    said, real = np.zeros_like(ids, bool), np.zeros_like(ids, bool)
    for number, row in enumerate(rows):
        end = len(row.ids)
        ids[number, :end], said[number, :end], real[number, :end] = row.ids, row.said, True
    pictures = {
        name: torch.from_numpy(np.concatenate([row.pictures[name] for row in rows]))
        for name in rows[0].pictures
    }
    tensors = (torch.from_numpy(array) for array in (ids, said, real))
    return Batch(*tensors, [row.task for row in rows], pictures)


if __name__ == "__main__":
    main()
