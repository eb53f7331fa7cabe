"""transformers' ``minimax_m3_vl`` as the oracle: random models, their logits, and true ties.

The oracle runs one unpadded row at a time; its own left-padded batches are wrong.
"""

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as t5
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import (
    MiniMaxM3VLConfig,
    MiniMaxM3VLTextConfig,
)

# Scores of blocks closer than this are ties that no specification orders.
TIE = 1e-5
# Scores of experts lie within [0, 1] and a bias, and their rounding within 5e-7.  A choice that
# is closer than this is as much a tie as one of blocks.
ROUTER_TIE = 2e-6

# What every shape shares unless it says otherwise: small enough for milliseconds, with more
# blocks than the budget in a hundred tokens.
BASE = dict(
    vocab_size=97,
    hidden_size=48,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    intermediate_size=24,
    dense_intermediate_size=40,
    shared_intermediate_size=32,
    num_local_experts=8,
    num_experts_per_tok=4,
    index_n_heads=4,
    index_head_dim=16,
    index_block_size=8,
    index_topk_blocks=4,
    index_local_blocks=1,
    max_position_embeddings=4096,
    rope_parameters={"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
)
SPARSE, DENSE = "minimax_m3_sparse", "full_attention"

# Several ratios of blocks to budget, 0 to 2 local blocks, both embeddings, all patterns of layers; and
# M3.1's pattern with 0 to 2 initial blocks, which transformers itself does not compute.
SHAPES: dict[str, dict[str, Any]] = {
    "as_published": dict(
        layer_types=[DENSE, SPARSE, SPARSE, SPARSE], mlp_layer_types=["dense", "sparse", "sparse", "sparse"]
    ),
    "no_local_block": dict(
        layer_types=[SPARSE] * 4,
        mlp_layer_types=["sparse"] * 4,
        index_local_blocks=0,
        index_topk_blocks=2,
        tie_word_embeddings=True,
    ),
    "two_local_blocks": dict(
        layer_types=[DENSE, SPARSE, DENSE, SPARSE],
        mlp_layer_types=["sparse", "dense", "sparse", "sparse"],
        index_local_blocks=2,
        index_topk_blocks=3,
        index_block_size=5,
        num_key_value_heads=2,
        index_n_heads=2,
        index_head_dim=24,
    ),
    "all_dense": dict(layer_types=[DENSE] * 4, mlp_layer_types=["dense"] * 4, num_key_value_heads=2),
    "single_group": dict(
        layer_types=[SPARSE] * 4,
        mlp_layer_types=["dense"] * 4,
        num_key_value_heads=1,
        index_n_heads=1,
        index_block_size=4,
        index_topk_blocks=6,
    ),
    **{
        f"init_{initial}_local_{local}": dict(
            layer_types=[SPARSE] * 4,
            mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
            index_init_blocks=initial,
            index_local_blocks=local,
        )
        for initial in (0, 1, 2)
        for local in (0, 1, 2)
    },
    "yarn": dict(
        layer_types=[DENSE, SPARSE, SPARSE, SPARSE],
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        max_position_embeddings=128,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 5e6,
            "partial_rotary_factor": 0.5,
            "factor": 2.0,
            "original_max_position_embeddings": 64,
        },
    ),
}


@dataclass
class Oracle:
    """A random model of transformers, with one prompt and its logits.

    Attributes:
        tokens: ``[T]`` prompt; ``logits``: ``[T, vocab]`` in one pass over it.
        ties: positions at which some layer's choice of blocks is a true tie.
    """

    model: Any
    tokens: np.ndarray
    logits: np.ndarray
    ties: set[int] = field(default_factory=set)

    def save(self, path: Path) -> None:
        save_model(self.model, path)


def save_model(model: Any, path: Path) -> None:
    """As ``save_pretrained`` writes it: published key names, 5.x config; and the initial blocks."""
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    counts = {getattr(indexer, "initial_blocks", 0) for indexer in indexers(model)}
    config["text_config"]["index_init_blocks"] = max(counts, default=0)
    (path / "config.json").write_text(json.dumps(config))


def indexers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, t5.MiniMaxM3VLIndexer)]


def make_oracle(shape: dict[str, Any], seed: int, n_tokens: int = 150) -> Oracle:
    """The model of ``seed``, or of the next one whose prompt meets no true tie.

    A tie at one position changes what later positions attend to, so its whole prompt would be
    left out; ``replaced`` counts them.
    """
    for attempt in range(5):
        oracle = _make_oracle(shape, seed + attempt * 1_000_003, n_tokens)
        if not oracle.ties:
            break
        replaced.append((seed, sorted(oracle.ties)))
    return oracle


# Seeds whose prompt met a true tie, with the positions.
replaced: list[tuple[int, list[int]]] = []


def _make_oracle(shape: dict[str, Any], seed: int, n_tokens: int) -> Oracle:
    torch.manual_seed(seed)
    text = MiniMaxM3VLTextConfig(**{**BASE, **shape})
    text._attn_implementation = "eager"
    tiny_vision = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28
    )
    config = MiniMaxM3VLConfig(
        text_config=text.to_dict(),
        vision_config=tiny_vision,
        projector_hidden_size=48,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    config._attn_implementation = "eager"
    config.text_config._attn_implementation = "eager"
    model = t5.MiniMaxM3SparseForConditionalGeneration(config).float().eval()
    force_initial_blocks(model, shape.get("index_init_blocks", 0))
    _randomize(model)

    tokens = np.random.default_rng(seed).integers(0, text.vocab_size, n_tokens)
    # A forced run of equal tokens makes index keys that differ by their rotation only.
    tokens[n_tokens // 2 : n_tokens // 2 + 10] = tokens[0]
    _unit_logits(model, tokens)
    with recorded_ties(model) as ties:
        logits = forward(model, tokens)
    return Oracle(model, tokens, logits, ties)


def force_initial_blocks(model: Any, count: int) -> None:
    """Patch the indexers of a model to keep the first ``count`` blocks.

    transformers 5.24 has no initial blocks: it drops the setting.  The patch does as transformers does for
    local blocks: before the top-k it raises the scores of these blocks, where a query sees them, to infinity.
    """
    if not count:
        return
    for indexer in indexers(model):
        indexer.initial_blocks = count
        indexer.forward = functools.partial(_forward_with_initial_blocks, indexer, count)


def _forward_with_initial_blocks(indexer: Any, count: int, *args: Any, **kwargs: Any) -> Any:
    topk = torch.Tensor.topk

    def topk_with_initial(scores: torch.Tensor, k: int, dim: int = -1, **options: Any) -> Any:
        first = scores[..., :count]
        scores[..., :count] = first.masked_fill(first > float("-inf"), float("inf"))
        return topk(scores, k, dim=dim, **options)

    torch.Tensor.topk = topk_with_initial  # type: ignore[method-assign,assignment]
    try:
        return type(indexer).forward(indexer, *args, **kwargs)
    finally:
        torch.Tensor.topk = topk  # type: ignore[method-assign]


def forward(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens)[None]).logits[0].float().numpy()


def _randomize(model: Any) -> None:
    """Weights that make attention peaked and every norm, bias and expert matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision" in name or "projector" in name:
                continue
            if parameter.ndim >= 2:
                fan_in = parameter.shape[-1]
                parameter.normal_(0, 1.0 if "embed" in name else fan_in**-0.5)
            else:
                parameter.normal_(0, 0.3)
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.normal_(0, 0.2)


def _unit_logits(model: Any, tokens: np.ndarray) -> None:
    """Scale the head, or the final norm where it is tied, to logits of standard deviation 1."""
    std = float(forward(model, tokens).std())
    with torch.no_grad():
        if model.config.text_config.tie_word_embeddings:
            norm = model.model.language_model.norm
            norm.weight.copy_((1 + norm.weight) / std - 1)
        else:
            model.lm_head.weight.div_(std)


class recorded_ties:
    """Collects the positions of one row where the last chosen and the next one are a tie: blocks,
    with scores within ``TIE``, or experts, with scores in [0, 1] within ``ROUTER_TIE``."""

    def __init__(self, model: Any):
        self._indexers = indexers(model)
        self._routers = [m for m in model.modules() if isinstance(m, t5.MiniMaxM3VLTopKRouter)]
        self.positions: set[int] = set()

    def __enter__(self) -> set[int]:
        self._topk = torch.Tensor.topk
        positions, topk = self.positions, self._topk
        budgets = {indexer.topk_blocks for indexer in self._indexers}

        def recording_topk(scores: torch.Tensor, k: int, dim: int = -1, **kwargs: Any) -> Any:
            # Block scores are the only four-axis tensors that the model takes a top-k of.
            if scores.ndim == 4 and k in budgets and scores.shape[-1] > k:
                ordered = scores.sort(dim=-1, descending=True).values
                last, next_ = ordered[..., k - 1], ordered[..., k]
                tied = (last - next_ < TIE) & torch.isfinite(last) & torch.isfinite(next_)
                positions.update(torch.nonzero(tied.any(dim=(0, 1))).flatten().tolist())
            return topk(scores, k, dim=dim, **kwargs)

        torch.Tensor.topk = recording_topk
        self._hooks = [router.register_forward_hook(self._look_at_experts) for router in self._routers]
        return positions

    def _look_at_experts(self, router: Any, _: Any, outputs: Any) -> None:
        scores = outputs[0].float().sigmoid() + router.e_score_correction_bias
        ordered = scores.sort(dim=-1, descending=True).values
        gaps = ordered[:, router.top_k - 1] - ordered[:, router.top_k]
        self.positions.update(torch.nonzero(gaps < ROUTER_TIE).flatten().tolist())

    def __exit__(self, *exc: Any) -> None:
        torch.Tensor.topk = self._topk
        for hook in self._hooks:
            hook.remove()
