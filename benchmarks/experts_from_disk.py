"""Experts on disk: tokens per second against what the disk and the arithmetic allow, ours and mlx-vlm's.

    python benchmarks/experts_from_disk.py [--layers 4] [--experts 32] [--pools 0.25 0.5]

A random model with M3's expert widths in 4 bits, on mlx-vlm.  Every read of an expert goes through one
throttle, for both forms of offload, so the page cache plays no part: a read takes as long as its bytes
take at a rate at which the misses of a token take ``ratio`` times the arithmetic of a token.  mlx-vlm's
reads happen inside MLX, and are charged where it asks for the experts.  Some experts are more popular than
others (a random bias of the router).

``of what is possible`` is max(time of the disk, time of the arithmetic) / time.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import mlx.core as mx
import numpy as np

from mlx_m3_plugin.weights import byte_ranges
from tests.checkpoints.random_model import m3_config
from tests.offload.disk_models import experts_of, load_on_disk, load_with, logits

HIDDEN, WIDTH, GROUP = 6144, 3072, 64
VOCABULARY = 256
PREFIX = "language_model.model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--pools", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 1, 4])
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="smaller for a quick look")
    args = parser.parse_args()
    globals().update(HIDDEN=args.hidden, WIDTH=args.hidden // 2)
    with tempfile.TemporaryDirectory() as directory:
        source, store = Path(directory) / "source", Path(directory) / "store"
        write_model(source, args.layers, args.experts)
        repack(source, store)
        show_disk(source)
        print(
            "| pool | disk / arithmetic | | tokens/s | bytes/token | hits | waiting | of what is possible |"
            " prompt tokens/s | of what is possible |\n|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|"
        )
        resident = measured(Resident(source), args)
        for pool in args.pools:
            for ratio in args.ratios:
                compare(source, store, pool, ratio, resident, args)


def compare(source: Path, store: Path, pool: float, ratio: float, resident: "Run", args: Any) -> None:
    """A line for each form of offload, at the rate where our misses take ``ratio`` times the arithmetic."""
    free = measured(Ours(source, pool), args)
    rate = free.bytes_read / args.tokens / (ratio * resident.decoding / args.tokens)
    forms: dict[str, Form] = {
        "ours": Ours(source, pool),
        "mlx-vlm": MlxVlm(store, pool * expert_bytes(args)),
    }
    for name, form in forms.items():
        with THROTTLE.at(rate):
            run = measured(form, args)
        print(
            f"| {pool} | {ratio} | {name} | {args.tokens / run.decoding:.2f} "
            f"| {run.bytes_read / args.tokens / 1e6:,.0f} MB | {run.hits:.0%} | {run.waiting:.0%} "
            f"| {max(free.bytes_read / rate, resident.decoding) / run.decoding:.2f} "
            f"| {args.prompt / run.prefill:.2f} "
            f"| {max(run.prefill_bytes / rate, resident.prefill) / run.prefill:.2f} |",
            flush=True,
        )


# --- the throttle ---


class Throttle:
    """One disk: what is read takes its time, one after the other, whoever reads."""

    def __init__(self) -> None:
        self.rate, self.bytes, self._free, self._lock = float("inf"), 0, 0.0, threading.Lock()

    @contextlib.contextmanager
    def at(self, rate: float) -> Iterator[None]:
        self.rate = rate
        yield
        self.rate = float("inf")

    def read(self, size: int) -> None:
        with self._lock:
            self.bytes += size
            self._free = max(self._free, time.perf_counter()) + size / self.rate
            until = self._free
        time.sleep(max(0, until - time.perf_counter()))


THROTTLE = Throttle()


def throttled(descriptor: int, buffers: list[memoryview], start: int) -> int:
    count = os.preadv(descriptor, buffers, start)
    THROTTLE.read(count)
    return count


byte_ranges.os = SimpleNamespace(**vars(os) | {"preadv": throttled})  # type: ignore[attr-defined]


# --- the forms ---


@dataclass
class Run:
    """Seconds and bytes of one run; ``waiting``: the share of decoding in which a layer waited."""

    prefill: float = 0
    prefill_bytes: int = 0
    decoding: float = 0
    bytes_read: int = 0
    hits: float = 1
    waiting: float = 0


@dataclass
class Form:
    directory: Path

    def load(self) -> Any:
        return load_with("mlx_vlm", self.directory)

    def counts(self, model: Any) -> tuple[int, int, float]:
        """Hits, misses and seconds of waiting so far."""
        return 1, 0, 0.0


class Resident(Form):
    pass


@dataclass
class Ours(Form):
    pool: float

    def load(self) -> Any:
        headers = json.loads((self.directory / "config.json").read_text())["text_config"]
        total = headers["num_hidden_layers"] * headers["num_local_experts"] * one_expert()
        return load_on_disk("mlx_vlm", self.directory, int(total * self.pool))

    def counts(self, model: Any) -> tuple[int, int, float]:
        slots = [layer.slots for layer in experts_of(model)]
        return sum(s.hits for s in slots), sum(s.misses for s in slots), sum(s.seconds_waited for s in slots)


@dataclass
class MlxVlm(Form):
    budget: float
    waited: float = field(default=0.0)

    def load(self) -> Any:
        from mlx_vlm.utils import load_model

        model = load_model(self.directory, expert_cache_gb=self.budget / 1e9)
        store = model.moe_offload_store

        def charged(get: Any) -> Any:
            def wrapped(layer: int, needed: Any) -> Any:
                everything = get.__name__ == "get_all"
                missing = [j for j in needed if everything or (layer, int(j)) not in store._lru]
                found = get(layer, needed)
                mx.eval([found[int(j)] for j in missing])
                began = time.perf_counter()
                for _ in missing:
                    THROTTLE.read(one_expert())
                self.waited += time.perf_counter() - began
                return found

            return wrapped

        store.get_many, store.get_all = charged(store.get_many), charged(store.get_all)
        return model

    def counts(self, model: Any) -> tuple[int, int, float]:
        return model.moe_offload_store._hits, model.moe_offload_store._misses, self.waited


def measured(form: Form, args: Any) -> Run:
    """A prompt, then tokens one by one.  The tokens are given, so that all forms compute the same."""
    model, run = form.load(), Run()
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (1, args.prompt + 8 + args.tokens))
    cache = model.make_cache()
    read, began = THROTTLE.bytes, time.perf_counter()
    mx.eval(logits(model, tokens[:, : args.prompt], cache))
    run.prefill, run.prefill_bytes = time.perf_counter() - began, THROTTLE.bytes - read
    for number in range(args.prompt, tokens.shape[1]):
        if number == args.prompt + 8:
            read, began, before = THROTTLE.bytes, time.perf_counter(), form.counts(model)
        mx.eval(logits(model, tokens[:, number : number + 1], cache))
    run.decoding, run.bytes_read = time.perf_counter() - began, THROTTLE.bytes - read
    hits, misses, waited = (after - b for after, b in zip(form.counts(model), before, strict=True))
    run.hits, run.waiting = hits / max(1, hits + misses), waited / run.decoding
    return run


# --- the model ---


def one_expert() -> int:
    """Bytes: three matrices in 4 bits, with a scale and a bias of 16 bits for each group."""
    return 3 * HIDDEN * WIDTH // 8 * 4 + 3 * HIDDEN * WIDTH // GROUP * 4


def expert_bytes(args: Any) -> int:
    return int(args.layers * args.experts * one_expert())


def write_model(directory: Path, layers: int, experts: int) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm.models.minimax_m3_vl import Model, ModelArgs

    config = m3_config(VOCABULARY, {"]<]image[>[": 1, "]<]video[>[": 2, "]~b]": 3, "[e~[": 4})
    config["text_config"] |= {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "shared_intermediate_size": 256,
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "moe_layer_freq": [1] * layers,
    }
    sparse = config["text_config"]["sparse_attention_config"]
    sparse["sparse_attention_freq"] = sparse["sparse_disable_index_value"] = [1] * layers
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    model = Model(ModelArgs.from_dict(json.loads(json.dumps(config))))
    random = np.random.default_rng(0)
    others = {}
    for name, array in tree_flatten(model.parameters()):
        if ".switch_mlp." in name:
            continue
        scale = array.shape[-1] ** -0.5 if array.ndim > 1 else 0.02
        # A layer changes its input little, and some experts are popular.
        scale *= 0.3 if name.endswith(("o_proj.weight", "shared_experts.down_proj.weight")) else 1
        scale = 0.1 if name.endswith("correction_bias") else scale
        scale = 1 if name.endswith("embed_tokens.weight") else scale
        others[name] = mx.array((random.standard_normal(array.shape) * scale).astype(np.float32))
    mx.save_safetensors(str(directory / "model-others.safetensors"), others)
    for layer in range(layers):
        mx.save_safetensors(
            str(directory / f"model-{layer}.safetensors"), random_experts(layer, experts, random)
        )


def random_experts(layer: int, experts: int, random: np.random.Generator) -> dict[str, mx.array]:
    made = {}
    for name, (n_out, n_in) in {
        "gate_proj": (WIDTH, HIDDEN),
        "up_proj": (WIDTH, HIDDEN),
        "down_proj": (HIDDEN, WIDTH),
    }.items():
        path = f"{PREFIX}.layers.{layer}.block_sparse_moe.switch_mlp.{name}"
        packed = random.integers(0, 1 << 32, (experts, n_out, n_in // 8), np.uint32)
        # Values from -8 to 7 times the scale have a standard deviation of 4.6 of it.
        scale = n_in**-0.5 / 4.6 * (0.3 if name == "down_proj" else 1)
        scales = mx.full((experts, n_out, n_in // GROUP), scale, mx.float16)
        made |= {
            f"{path}.weight": mx.array(packed),
            f"{path}.scales": scales,
            f"{path}.biases": scales * -7.5,
        }
    return made


def repack(source: Path, store: Path) -> None:
    from mlx_vlm import moe_offload

    with contextlib.redirect_stdout(io.StringIO()):
        moe_offload.repack(str(source), str(store))


def show_disk(source: Path) -> None:
    """The rate of the disk itself, with what the page cache gives: for comparison only."""
    path = max(source.glob("model-*.safetensors"), key=lambda file: file.stat().st_size)
    size, rng = path.stat().st_size, np.random.default_rng(0)
    descriptor, piece = os.open(path, os.O_RDONLY), one_expert()
    for name, starts in (
        ("sequential", list(range(0, size - piece, piece))),
        ("random", [int(n) for n in rng.integers(0, size - piece, 16)]),
    ):
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        for start in starts:
            os.pread(descriptor, piece, start)
        print(f"The disk, {name}: {len(starts) * piece / (time.perf_counter() - began) / 1e9:.2f} GB/s")
    os.close(descriptor)


if __name__ == "__main__":
    main()
