"""Train M3-nano's draft head: a DSpark head, as MiniMax-M3.1-Flash has one.

    python examples/nano/train_drafter.py build/draft [--tokens 300000] [--steps 2000] [--package]

It learns what M3-nano itself says.  First M3-nano reads conversations, and its hidden states are kept; then
the head is trained on them.  After Ctrl-C the same command uses what was read.
"""

import argparse
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import conversations
import mlx.core as mx
import mlx_vlm.models.minimax_m3_vl  # noqa: F401 (with it come the processors)
import needles
import numpy as np
import torch
from draft_net import DraftHead
from mlx_vlm.utils import load_processor
from muon import Muon
from torch.nn.utils import clip_grad_norm_
from transformers import AutoTokenizer, MiniMaxM3SparseForConditionalGeneration

from mlx_m3_plugin.cli import main as mlx_m3
from mlx_m3_plugin.model.config import text_config_of
from mlx_m3_plugin.toolbox.checkpoint import open_checkpoint
from mlx_m3_plugin.toolbox.convert.plan import plan_conversion
from mlx_m3_plugin.toolbox.convert.recipe import parse_recipe
from mlx_m3_plugin.toolbox.convert.run import write
from mlx_m3_plugin.toolbox.demo import NANO
from mlx_m3_plugin.toolbox.new_directory import new_directory
from mlx_m3_plugin.weights.headers import DRAFT_FOLDER, INDEX
from mlx_m3_plugin.weights.names import DRAFT_PREFIX, EXPERT_PROJECTIONS

LAYERS = [0, 1, 2, 3]
# Of the texts, from the first to the last, so many are easier than all the others.
LEARNER = 0.3
TOKENS_PER_STEP = 2048
# Blocks that are drafted in each row.
BLOCKS = 32
RATE, LEAST_RATE, WARM_UP = 6e-3, 0.02, 60
LOG_EVERY = 100


def config(directory: Path, token_id: dict[str, int]) -> dict[str, Any]:
    """In the form of M3.1's draft head, with nano's sizes."""
    text = text_config_of(json.loads((directory / "config.json").read_text()))
    same = ("hidden_size", "vocab_size", "num_attention_heads", "head_dim", "rms_norm_eps", "rope_theta")
    same += ("rotary_dim", "max_position_embeddings", "swiglu_alpha", "swiglu_limit")
    own = {
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "dense_intermediate_size": 256,
        "dspark_ffn_hidden_size": 256,
        "dspark_use_dense_ffn": True,
        "moe_layer_freq": [0, 0],
        "layer_types": ["sliding_attention"] * 2,
        "sliding_window": 1024,
        "sparse_attention_config": None,
        "use_gemma_norm": True,
        "hidden_act": "swigluoai",
        "dspark_block_size": 7,
        "dspark_noise_token_id": token_id["]<]minimax[>["],
        "dspark_target_layer_ids": LAYERS,
        "dspark_markov_rank": 64,
        "dspark_markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "dspark_hybrid_context_fusion": False,
    }
    return {
        "architectures": ["DSparkMiniMaxDraftModel"],
        "model_type": "minimax_m3_dspark",
        "text_config": {name: getattr(text, name) for name in same} | own,
    }


# --- what the target says ---


class Target:
    """M3-nano in transformers, which is several times as fast on a CPU as mlx-vlm."""

    def __init__(self, directory: Path, work: Path):
        copy = work / "float"
        if not copy.exists():
            write_float(directory, copy)
        self.model = MiniMaxM3SparseForConditionalGeneration.from_pretrained(copy, dtype=torch.float32).eval()
        self.encoder = conversations.Encoder(
            AutoTokenizer.from_pretrained(directory), load_processor(directory)
        )
        self.count = needles.token_counter(directory)
        self._outputs: list[torch.Tensor] = []
        for layer in self.model.model.language_model.layers:
            layer.register_forward_hook(lambda _, args, output: self._outputs.append(output))

    @torch.inference_mode()
    def read(self, text: conversations.Encoded) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens are its own ``[L]``, and its hidden states ``[L, layers * D]`` in float16."""
        pictures = {name: torch.from_numpy(array) for name, array in text.pictures.items()}
        self._outputs.clear()
        logits = self.model(input_ids=torch.from_numpy(text.ids[None]).long(), **pictures).logits
        outputs = [self._outputs[layer] for layer in LAYERS]
        features = torch.cat([o[0] if isinstance(o, tuple) else o for o in outputs], -1)[0].half().numpy()
        return own_replies(text.ids, text.said, logits[0].argmax(-1).numpy()), features

    def draw(self, rng: random.Random, difficulty: float) -> conversations.Encoded:
        cases = conversations.draw(rng, difficulty, self.count)
        return self.encoder.encode(cases, preamble=not conversations.leaves_out_preamble(rng, difficulty))

    def matrices(self) -> list[torch.Tensor]:
        """Embedding and head, ``[V, D]`` each."""
        modules = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        return [module.weight.detach() for module in modules]


def write_float(source: Path, directory: Path) -> None:
    """The same weights in float32, under the published names, which transformers reads."""
    checkpoint = open_checkpoint(source)
    recipe = parse_recipe("float", '[default]\ndtype = "float32"', checkpoint.text_config)
    with new_directory(directory, "convert", resumable=True) as unfinished:
        write(plan_conversion(checkpoint, recipe), unfinished, memory=1 << 28, progress=lambda *_: None)
    (shard,) = directory.glob("*.safetensors")
    tensors = {}
    for name, array in mx.load(str(shard)).items():
        if ".switch_mlp." not in name:
            tensors[name] = array
            continue
        moe, _, projection = name.removesuffix(".weight").partition("switch_mlp.")
        stored = next(w for w, published in EXPERT_PROJECTIONS.items() if published == projection)
        tensors |= {f"{moe}experts.{n}.{stored}.weight": expert for n, expert in enumerate(array)}
    mx.save_safetensors(str(directory / "model.safetensors"), tensors, metadata={"format": "pt"})
    shard.unlink()
    (directory / INDEX).unlink()


def own_replies(ids: np.ndarray, said: np.ndarray, greedy: np.ndarray) -> np.ndarray:
    """``said`` without the replies that the model would not give.

    By induction, a reply is its own if each token is its first choice after those before it.
    """
    wrong = said.copy()
    wrong[1:] &= greedy[:-1] != ids[1:]
    own = said.copy()
    edges = np.flatnonzero(np.diff(np.concatenate(([0], said.astype(int), [0]))))
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        own[start:end] = not wrong[start:end].any()
    return own


class Texts:
    """Conversations that the target has read, in the order of their difficulty; in files of a directory."""

    def __init__(self, directory: Path):
        self._files = {name: directory / f"{name}.npy" for name in ("lengths", "ids", "own", "features")}

    @property
    def are_there(self) -> bool:
        return self._files["lengths"].exists()

    def record(self, target: Target, tokens: int, seed: int) -> None:
        rng, begun, done = random.Random(f"draft {seed}"), time.monotonic(), 0
        read: list[tuple[np.ndarray, ...]] = []
        while done < tokens:
            text = target.draw(rng, min(1.0, done / (LEARNER * tokens)))
            own, features = target.read(text)
            # Without one there is nothing to learn.
            if (own[:-1] & own[1:]).any():
                read.append((text.ids.astype(np.int32), own, features))
                done += len(text.ids)
            if len(read) % 100 == 0:
                print(f"{done:,} tokens read in {time.monotonic() - begun:.0f} s", flush=True)
        for name, arrays in zip(("ids", "own", "features"), zip(*read, strict=True), strict=True):
            np.save(self._files[name], np.concatenate(arrays))
        np.save(self._files["lengths"], [len(ids) for ids, *_ in read])

    def batches(self, rng: random.Random) -> Iterator[tuple[torch.Tensor, ...]]:
        """One pass over the texts, those of about the same length together: ids, own and features."""
        lengths = np.load(self._files["lengths"])
        arrays = [np.load(self._files[name], mmap_mode="r") for name in ("ids", "own", "features")]
        ends = np.cumsum(lengths)
        order = sorted(range(len(lengths)), key=lambda n: lengths[n] + rng.random())
        batches: list[list[int]] = [[]]
        for number in order:
            if (len(batches[-1]) + 1) * lengths[number] > TOKENS_PER_STEP:
                batches.append([])
            batches[-1].append(number)
        rng.shuffle(batches)
        for rows in filter(None, batches):
            slices = [slice(ends[n] - lengths[n], ends[n]) for n in rows]
            ids, own, features = ([torch.from_numpy(array[s].copy()) for s in slices] for array in arrays)
            padded = (
                torch.nn.utils.rnn.pad_sequence(each, batch_first=True) for each in (ids, own, features)
            )
            ids, own, features = padded
            yield ids.long(), own, features.float()


# --- the training ---


def train(head: DraftHead, texts: Texts, matrices: list[torch.Tensor], steps: int, seed: int) -> None:
    rng = random.Random(f"training {seed}")
    inner = [p for n, p in head.named_parameters() if p.ndim == 2 and ("layers." in n or n.startswith("fc"))]
    others = [p for p in head.parameters() if not any(p is each for each in inner)]
    optimizers = [
        Muon(inner, RATE),
        torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    begun, seen = time.monotonic(), []
    for step, (ids, own, features) in enumerate(_endlessly(texts, rng)):
        if step == steps:
            return
        loss, right = head.loss(features, ids, own, draw_anchors(own, rng), *matrices)
        loss.backward()
        clip_grad_norm_(head.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = RATE * _schedule(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        seen.append((loss.item(), right))
        if (step + 1) % LOG_EVERY == 0:
            of_loss, of_right = np.mean(seen, axis=0)
            line = {"step": step + 1, "seconds": round(time.monotonic() - begun)}
            print(json.dumps(line | {"loss": round(of_loss, 4), "right": round(of_right, 3)}), flush=True)
            seen = []


def _endlessly(texts: Texts, rng: random.Random) -> Iterator[tuple[torch.Tensor, ...]]:
    while True:
        yield from texts.batches(rng)


def draw_anchors(own: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """``[B, BLOCKS]`` positions of the model's own tokens before another one."""
    possible = ((row[:-1] & row[1:]).nonzero()[:, 0].tolist() for row in own)
    return torch.tensor([rng.choices(positions, k=BLOCKS) for positions in possible])


def _schedule(step: int, steps: int) -> float:
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return LEAST_RATE + (1 - LEAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / steps))


def save(head: DraftHead, config: dict[str, Any], directory: Path) -> None:
    """As MiniMax publishes its head, but all in bfloat16."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    tensors = {
        DRAFT_PREFIX + name: mx.array(parameter.numpy()).astype(mx.bfloat16)
        for name, parameter in head.state_dict().items()
    }
    mx.save_safetensors(str(directory / "model.safetensors"), tensors, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", type=Path, default=NANO)
    parser.add_argument("--tokens", type=int, default=300_000, help="of the texts")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--package", action="store_true", help="put it, in 8 bits, beside the packaged model")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    target, texts = Target(arguments.model, arguments.directory), Texts(arguments.directory)
    if not texts.are_there:
        texts.record(target, arguments.tokens, arguments.seed)
    made = config(arguments.model, target.encoder.tokenizer.get_vocab())
    torch.manual_seed(arguments.seed)
    head = DraftHead(made["text_config"])
    print(f"{sum(parameter.numel() for parameter in head.parameters()):,} parameters")
    train(head, texts, target.matrices(), arguments.steps, arguments.seed)
    save(head, made, arguments.directory / DRAFT_FOLDER)
    if arguments.package:
        package(arguments.directory / DRAFT_FOLDER)


def package(head: Path) -> None:
    """As ``mlx-m3 convert --recipe 8bit`` makes it of a model with this head."""
    with tempfile.TemporaryDirectory() as work:
        source, made = Path(work) / "source", Path(work) / "made"
        shutil.copytree(NANO, source, ignore=shutil.ignore_patterns(DRAFT_FOLDER))
        shutil.copytree(head, source / DRAFT_FOLDER)
        if mlx_m3(["convert", str(source), str(made), "--recipe", "8bit"]):
            raise SystemExit(1)
        shutil.rmtree(NANO / DRAFT_FOLDER, ignore_errors=True)
        shutil.copytree(made / DRAFT_FOLDER, NANO / DRAFT_FOLDER)


if __name__ == "__main__":
    main()
