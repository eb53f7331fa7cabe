"""Of recipes, on models in which it matters what is chosen: which are better, and is that what is told?"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mlx_m3_plugin.model.config import text_config_of
from mlx_m3_plugin.toolbox.forward_pass import Texts, cut
from tests.checkpoints.conversions import converted
from tests.checkpoints.random_model import m3_config, random_weights
from tests.toolbox.in_memory import compared, evaluate, log_probabilities

VOCABULARY, LAYERS, DENSE = 256, 8, 3
# 16 times the block budget.
WINDOW = 512
RECIPES = ("oq2", "oq3", "4bit", "oq5", "6bit", "8bit", "selector-safe")
UNIFORM = """
summary = "{bits} bits everywhere, 8 in the router"
[default]
bits = {bits}
group_size = 64
[[rule]]
parts = ["router"]
bits = 8
group_size = 64
"""


def write_selective(directory: Path, seed: int) -> Path:
    """A model of random values whose attention is sharp and weighs much.

    So it shows in the logits which blocks and which of 64 experts were chosen, and random scores are
    close.  Experts hold nearly nine tenths of the parameters.
    """
    special = ("]!p~[", "[e~[", "]~b]", "]<]image[>[", "]<]video[>[")
    config = m3_config(VOCABULARY, {token: number for number, token in enumerate(special)})
    text, with_experts = config["text_config"], [0] * DENSE + [1] * (LAYERS - DENSE)
    text |= {"num_hidden_layers": LAYERS, "num_local_experts": 64, "moe_layer_freq": with_experts}
    for name in ("sparse_attention_freq", "sparse_disable_index_value"):
        text["sparse_attention_config"][name] = with_experts
    weights = dict(random_weights(text_config_of(config), np.random.default_rng(seed)))
    for name in weights:
        if name.endswith((".self_attn.q_norm.weight", ".self_attn.k_norm.weight")):
            # Gemma's norm multiplies with one more than this.
            weights[name] += np.float32(1)
        if name.endswith("o_proj.weight"):
            weights[name] *= np.float32(2)
    directory.mkdir()
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def random_texts(seed: int, tokens: int) -> Texts:
    numbers = np.random.default_rng(seed).integers(0, VOCABULARY, tokens)
    return cut([int(number) for number in numbers], None, WINDOW)


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values))


def test_evaluation_ranks_recipes_as_they_are_and_what_chooses_is_worth_its_bits(
    tmp_path: Path,
    fresh_seed: int,
    count: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    for seed in range(fresh_seed, fresh_seed + count(1, 5)):
        root = tmp_path / str(seed)
        root.mkdir()
        source = write_selective(root / "source", seed)
        told: dict[str, float] = {}
        true: dict[str, float] = {}
        # Of other tokens, and more of them.
        others = random_texts(seed + 1, count(2, 4) * WINDOW)
        reference = log_probabilities(source, others)
        sizes: dict[str, int] = {}
        five = root / "uniform.toml"
        five.write_text(UNIFORM.format(bits=5))
        for recipe in (*RECIPES[:: count(2, 1)], str(five)):
            name = Path(recipe).stem
            made = root / f"{name}-made"
            sizes[name] = converted(source, recipe, made).nbytes
            found = evaluate(
                made,
                random_texts(seed, WINDOW),
                reference=source,
                cache=root / "cache",
                memory=1 << 30,
                step=WINDOW,
            )
            assert found.distributions is not None
            told[name] = found.distributions.kl_mean
            true[name] = compared(log_probabilities(made, others), reference, others)["kl_mean"]
        correlation = np.corrcoef(ranks(list(told.values())), ranks(list(true.values())))[0, 1]
        print(f"seed {seed}: rank correlation {correlation:.3f}", true, sizes)
        record_property(f"rank correlation {seed}", correlation)
        # Of five recipes, two neighbours may change places.
        assert round(correlation, 6) >= 0.9, (told, true)
        # Uniform bits at least as large, and one less.
        assert sizes["uniform"] >= sizes["selector-safe"] > sizes["4bit"]
        assert true["selector-safe"] < true["uniform"] < true["4bit"]
