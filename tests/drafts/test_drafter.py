"""M3.1's draft head: loaded as published, compared with its description, and refused where it is wrong."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_vlm.speculative.drafters.dspark", reason="this mlx-vlm has no DSpark")

from tests.drafts import checkpoint as drafts
from tests.drafts.reference import PREFIX, Reference
from tests.drafts.runs import load
from tests.vlm.vlm_runs import text

TOLERANCE = 5e-5


def run(drafter: Any, features: mx.array, splits: list[int], anchor: int, n: int) -> tuple[list[int], Any]:
    """Drafts after all features, given in pieces, and their logits."""
    context, logits, given = drafter.make_cache(), [], 0

    def sampler(step: mx.array) -> mx.array:
        logits.append(step[0])
        return mx.argmax(step, axis=-1)

    for end in splits:
        logits.clear()
        drafted = drafter.draft_block(anchor, features[:, given:end], context, n + 1, sampler)
        given = end
    return drafted[0].tolist(), logits


@pytest.mark.parametrize("stored", ["mxfp8", "bfloat16", "affine"])
def test_logits_equal_the_description(
    stored: str,
    model: Any,
    tmp_path: Path,
    fresh_seed: int,
    count: Callable[[int, int], int],
) -> None:
    """Whatever pieces the context comes in, before the window of 24 and past it."""
    random = np.random.default_rng(fresh_seed)
    lm = model.language_model
    target = [np.array(a) for a in (lm.model.embed_tokens.weight, lm.lm_head.weight)]
    seen = set()
    for case in range(count(3, 30)):
        causal = bool(case % 3 == 2)
        config = drafts.config(dspark_causal=causal)
        weights = drafts.values(config["text_config"], int(random.integers(2**31)))
        stands_for = drafts.write(tmp_path / str(case), config, weights, stored)
        drafter = load(tmp_path / str(case)).bind(model)
        reference = Reference({k: np.array(v) for k, v in stands_for.items()}, config["text_config"], *target)
        length, n = int(random.integers(1, 70)), int(random.integers(1, 8))
        features = random.standard_normal((length, 2 * drafts.HIDDEN)).astype(np.float32)
        cuts = random.choice(length, size=min(length, int(random.integers(0, 12))), replace=False)
        splits = sorted({*(int(cut) for cut in cuts if cut), length})
        anchor = int(random.integers(640))
        tokens, logits = run(drafter, mx.array(features[None]), splits, anchor, n)
        expected, expected_logits, sure = reference.draft(features, anchor, n)
        worst = max(float(abs(np.array(a) - b).max()) for a, b in zip(logits, expected_logits, strict=True))
        assert worst <= TOLERANCE
        assert tokens == expected
        block = mx.array([[anchor] + [drafter.config.mask_token_id] * (n - 1)])
        normed = drafter._hidden(block, mx.array(features[None]), drafter.make_cache())
        confidence = drafter.confidence(normed, mx.array([anchor]), mx.array([tokens]))
        assert float(abs(np.array(confidence)[0] - sure).max()) <= TOLERANCE
        seen.add((causal, length > 24))
    assert len(seen) > 1


# --- what is wrong ---

WRONG_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "markov type": ({"dspark_markov_head_type": "gated"}, "markov_head_type"),
    "full attention": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "experts": ({"moe_layer_freq": [0, 1]}, "moe_layer_freq"),
    "an indexer": ({"sparse_attention_config": {"sparse_block_size": 8}}, "sparse_attention_config"),
    "fusion": ({"dspark_hybrid_context_fusion": True}, "dspark_hybrid_context_fusion"),
    "widths of the MLP": ({"dspark_ffn_hidden_size": 256}, "dspark_ffn_hidden_size"),
    "no window": ({"sliding_window": None}, "sliding_window"),
    "no block": ({"dspark_block_size": 0}, "dspark_block_size"),
    "no layers to read": ({"dspark_target_layer_ids": []}, "dspark_target_layer_ids"),
    "layers out of order": ({"dspark_target_layer_ids": [2, 0]}, "dspark_target_layer_ids"),
    "noise outside": ({"dspark_noise_token_id": 704}, "mask_token_id"),
    "features": ({"dspark_features": "residual"}, "dspark_features"),
    "a plain up projection": ({"swiglu_beta": 0}, "swiglu_beta"),
}


@pytest.mark.parametrize(("edit", "named"), WRONG_CONFIGS.values(), ids=WRONG_CONFIGS.keys())
def test_wrong_configs_are_refused(edit: dict[str, Any], named: str, tmp_path: Path) -> None:
    config = drafts.config()
    weights = drafts.values(config["text_config"], 1)
    config["text_config"] |= edit
    drafts.write(tmp_path, config, weights)
    with pytest.raises(ValueError, match=named):
        load(tmp_path)


LOST = ("confidence_head", "markov_head.markov_w2", "fc", "hidden_norm", "layers.1.input_layernorm")


@pytest.mark.parametrize("lost", LOST)
def test_missing_tensors_are_named(lost: str, tmp_path: Path) -> None:
    weights = drafts.values(drafts.config()["text_config"], 1)
    kept = {name: a for name, a in weights.items() if lost not in name.replace("decoder_layer.", "")}
    assert len(kept) < len(weights)
    drafts.write(tmp_path, drafts.config(), kept)
    with pytest.raises(ValueError, match=f"lacks {re.escape(lost)}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "shape", "named"),
    [
        ("embed_tokens.weight", (704, 128), "left over (1):\n  embed_tokens.weight"),
        ("fc.weight", (128, 128), "fc.weight: (128, 128) in the checkpoint, (128, 256) in the model"),
    ],
)
def test_odd_tensors_are_named(name: str, shape: tuple[int, ...], named: str, tmp_path: Path) -> None:
    weights = drafts.values(drafts.config()["text_config"], 1)
    drafts.write(tmp_path, drafts.config(), weights | {PREFIX + name: mx.zeros(shape)})
    with pytest.raises(ValueError, match=re.escape(named)):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ({"hidden_size": 64}, "hidden_size 64, not 128"),
        ({"vocab_size": 640, "dspark_noise_token_id": 639}, "vocab_size 640, not 704"),
        ({"dspark_target_layer_ids": [0, 3]}, "layer 3 of a model that has 3 layers"),
        ({"dspark_target_layer_ids": [0, 1], "dspark_features": "normed_output"}, "not the last of 3"),
    ],
    ids=["width", "vocabulary", "layer", "norm"],
)
def test_heads_of_other_models_are_refused(
    text: dict[str, Any], named: str, model: Any, tmp_path: Path
) -> None:
    """Before a token, by mlx-vlm's own check, which its commands report."""
    from mlx_vlm.speculative.drafters import validate_drafter_compatibility

    config = drafts.config(**text)
    drafts.write(tmp_path, config, drafts.values(config["text_config"], 1))
    with pytest.raises(ValueError, match=named):
        validate_drafter_compatibility(model, load(tmp_path), "dflash")


def test_a_shard_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    drafts.write(tmp_path, drafts.config(), drafts.values(drafts.config()["text_config"], 1))
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        load(tmp_path)


# --- finding it ---


def test_the_folder_of_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """``--draft-model`` with the target itself."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    with pytest.raises(ValueError, match=r"without a draft head in dspark/"):
        load(tmp_path)
    drafts.write(tmp_path / "dspark", drafts.config(), drafts.values(drafts.config()["text_config"], 1))
    assert mx.array_equal(load(tmp_path).fc.weight, load(tmp_path / "dspark").fc.weight)


# --- where the sources disagree ---


@pytest.mark.parametrize("features", ["output", "normed_output", "input"])
def test_where_hidden_states_are_taken(features: str, model: Any, tmp_path: Path) -> None:
    config = drafts.config(dspark_features=features)
    drafts.write(tmp_path, config, drafts.values(config["text_config"], 1))
    ids = load(tmp_path).config.target_layer_ids
    lm, tokens = model.language_model, mx.array([text(40).tokens])
    first, last = lm(tokens, capture_layer_ids=ids).hidden_states
    outputs = lm(tokens, capture_layer_ids=[0, 1, 2]).hidden_states
    if features == "input":
        expected = lm.model.embed_tokens(tokens), outputs[1]
    else:
        expected = outputs[0], lm.model.norm(outputs[2]) if features == "normed_output" else outputs[2]
    assert mx.array_equal(first, expected[0])
    assert mx.array_equal(last, expected[1])


def test_older_hosts_say_that_they_know_no_dspark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_m3_plugin.hosts.mlx_vlm import drafts as patches

    drafts.write(tmp_path, drafts.config(), drafts.values(drafts.config()["text_config"], 1))
    monkeypatch.setattr(patches, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="this mlx-vlm does not know DSpark draft heads"):
        load(tmp_path)
