"""A LoRA step past the block budget: memory and time, with our class and with mlx-lm's own.

    python benchmarks/training.py [--tokens 4096 8192 16384] [--stock 4096]

One sparse layer of one KV group with 16 query heads of 128 channels, adapters on q and v, float32.  Both
classes have the same weights and take the same step.  The bound is twice the engine's memory budget plus
what the rest of the step takes, which is measured with an attention that costs nothing.  Stock's memory is
measured for ``--stock`` tokens, and computed for more: its scores of all queries with all keys are nearly
all of it, so that it grows with the square of the tokens.  Seconds are those of the processor.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers
from msa_layers import CONFIG, upstream_module

from mlx_m3_plugin.hosts.mlx_lm import minimax_m3_vl as ours
from mlx_m3_plugin.msa import engine
from mlx_m3_plugin.msa.common import default_tile_bytes

HEADS, GROUPS = 16, 1
TEXT = CONFIG | {
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "sparse_attention_config": CONFIG["sparse_attention_config"] | {"sparse_num_index_heads": GROUPS},
}
LORA = {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "self_attn.v_proj"]}
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--stock", type=int, nargs="+", default=[4096])
    arguments = parser.parse_args()
    model = prepared(ours)
    stock = prepared(upstream_module("mlx_lm.models", "minimax_m3_vl.py"), model)
    print(f"mlx {mx.__version__}, {mx.default_device()}; MiB and seconds, loss in brackets\n")
    print("| tokens | ours | the rest of the step | bound | stock | ours, s | stock, s |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    largest = (0, 0.0)
    for tokens in sorted({*arguments.tokens, *arguments.stock}):
        memory, seconds, loss = step(model, tokens)
        rest = rest_of_the_step(model, tokens)
        bound = 2 * (default_tile_bytes() + rest)
        row = [f"{tokens:,}", f"**{memory / MIB:,.0f}**", f"{rest / MIB:,.0f}", f"{bound / MIB:,.0f}"]
        if tokens in arguments.stock:
            of_stock, stock_seconds, stock_loss = step(stock, tokens)
            largest = (tokens, of_stock)
            row += [f"{of_stock / MIB:,.0f}", f"{seconds:.1f} ({loss:.4f})"]
            row += [f"{stock_seconds:.1f} ({stock_loss:.4f})"]
        else:
            computed = largest[1] * (tokens / max(1, largest[0])) ** 2
            row += [f"{computed / MIB:,.0f} (computed)", f"{seconds:.1f}", ""]
        print("| " + " | ".join(row) + " |", flush=True)


def prepared(module: Any, like: Any = None) -> Any:
    """A class's model with adapters, and with the weights of another."""
    mx.random.seed(0)
    arguments = {"model_type": "minimax_m3_vl", "text_config": TEXT}
    model = module.Model(module.ModelArgs.from_dict(arguments)).train()
    model.freeze()
    linear_to_lora_layers(model, -1, LORA)
    if like is None:
        weights = [(n, mx.random.normal(a.shape) * a.shape[-1] ** -0.5) for n, a in parameters(model)]
    else:
        weights = parameters(like)
    model.load_weights(weights)
    mx.eval(model.parameters())
    return model


def parameters(model: Any) -> Any:
    return tree_flatten(model.parameters())


def step(model: Any, tokens: int) -> tuple[int, float, float]:
    """Bytes above the weights at the peak, seconds of the processor, and the loss."""
    batch = mx.random.randint(0, TEXT["vocab_size"], (1, tokens + 1), key=mx.random.key(tokens))
    lengths = mx.array([[0, tokens]])
    mx.eval(batch, lengths)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.process_time()
    (loss, _), gradients = nn.value_and_grad(model, default_loss)(model, batch, lengths)
    mx.eval(loss, gradients)
    return mx.get_peak_memory() - before, time.process_time() - start, loss.item()


def rest_of_the_step(model: Any, tokens: int) -> int:
    attend: Callable[..., mx.array] = engine.attend
    engine.attend = lambda queries, keys, values, *_, **__: queries + keys + values  # type: ignore[assignment]
    try:
        return step(model, tokens)[0]
    finally:
        engine.attend = attend  # type: ignore[assignment]


if __name__ == "__main__":
    main()
