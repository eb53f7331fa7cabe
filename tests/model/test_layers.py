"""Norm, activation, router and mixture against formulas in numpy, written from the reference."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_m3_plugin.hosts.mlx_lm.model import MLX_LM
from mlx_m3_plugin.model.config import TextConfig
from mlx_m3_plugin.model.moe import DenseMLP, SparseMoeBlock, SwiGLUOAI, swiglu_oai
from mlx_m3_plugin.model.norm import GemmaRMSNorm, make_norm

HIDDEN, EXPERTS, TOP = 32, 8, 3


def small_config(**changes) -> TextConfig:
    return TextConfig(
        hidden_size=HIDDEN,
        intermediate_size=16,
        shared_intermediate_size=24,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP,
        **changes,
    )


def normal(*shape, seed=0, scale=1.0, dtype=mx.float32):
    return mx.array(np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)).astype(dtype)


def float64(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# --- norm ---


def norm_formula(x, weight, eps):
    """``x / rms(x) * (1 + w)`` of the stored values, in float64."""
    x = float64(x)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * (1 + float64(weight))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_norm_is_the_formula_rounded_once(dtype):
    norm = GemmaRMSNorm(64, eps=1e-6)
    norm.weight = normal(64, seed=1, scale=0.3, dtype=dtype)
    x = normal(200, 64, dtype=dtype)
    out = norm(x)
    exact = norm_formula(x, norm.weight, norm.eps)
    assert out.dtype == dtype
    np.testing.assert_allclose(float64(out), exact, rtol=mx.finfo(dtype).eps * 0.51, atol=1e-6)


def test_one_plus_weight_is_not_rounded_to_bfloat16():
    """1.003 is 1 in bfloat16: a weight of 0.003 would be lost."""
    norm = GemmaRMSNorm(64)
    norm.weight = mx.full((64,), 0.003, dtype=mx.bfloat16)
    x = normal(200, 64, dtype=mx.bfloat16)
    assert (1 + norm.weight).tolist() == [1.0] * 64
    out = norm(x)
    exact = mx.array(norm_formula(x, norm.weight, norm.eps).astype(np.float32)).astype(mx.bfloat16)
    rounded = mx.fast.rms_norm(x, 1 + norm.weight, norm.eps)
    assert (out == exact).mean().item() > 0.999
    assert (out == rounded).mean().item() < 0.9


def test_a_zero_weight_is_the_plain_norm():
    norm = GemmaRMSNorm(16, eps=1e-5)
    assert norm.parameters()["weight"].tolist() == [0.0] * 16
    x = normal(4, 16)
    assert mx.allclose(norm(x), mx.fast.rms_norm(x, mx.ones(16), 1e-5))


def test_norm_uses_its_eps():
    norm = GemmaRMSNorm(16, eps=1.0)
    x = normal(4, 16)
    np.testing.assert_allclose(float64(norm(x)), norm_formula(x, norm.weight, 1.0), rtol=1e-5)


def test_the_config_names_the_kind_of_norm():
    assert isinstance(make_norm(small_config(), 8), GemmaRMSNorm)
    plain = make_norm(small_config(use_gemma_norm=False, rms_norm_eps=0.5), 8)
    assert isinstance(plain, nn.RMSNorm)
    assert plain.eps == 0.5


# --- activation ---


def swiglu_formula(gate, up, alpha=1.702, limit=7.0):
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return gate * sigmoid(alpha * gate) * (up + 1)


def activate(gate, up, alpha=1.702, limit=7.0):
    return swiglu_oai(mx.array([gate]), mx.array([up]), alpha, limit).item()


def test_activation_formula():
    gate, up = normal(1000, scale=6), normal(1000, seed=1, scale=6)
    out = swiglu_oai(gate, up, 1.702, 7.0)
    np.testing.assert_allclose(float64(out), swiglu_formula(float64(gate), float64(up)), rtol=1e-5, atol=1e-5)


def test_the_gate_is_clamped_from_above():
    assert activate(20.0, 0.5) == activate(7.0, 0.5)


def test_the_gate_is_not_clamped_from_below():
    """At -20 the gate is all but closed, at -7 it is not."""
    assert abs(activate(-20.0, 0.5)) < 1e-12
    assert abs(activate(-7.0, 0.5)) > 1e-5


def test_up_is_clamped_on_both_sides():
    assert activate(2.0, 20.0) == activate(2.0, 7.0)
    assert activate(2.0, -20.0) == activate(2.0, -7.0)


def test_activation_uses_the_constants_of_the_config():
    module = SwiGLUOAI(small_config(swiglu_alpha=0.5, swiglu_limit=2.0))
    gate, up = normal(100, scale=3), normal(100, seed=1, scale=3)
    expected = swiglu_formula(float64(gate), float64(up), 0.5, 2.0)
    np.testing.assert_allclose(float64(module(up, gate)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_activation_keeps_the_dtype(dtype):
    assert swiglu_oai(normal(4, dtype=dtype), normal(4, dtype=dtype), 1.702, 7.0).dtype == dtype


# --- router ---


def router(**changes) -> SparseMoeBlock:
    moe = SparseMoeBlock(small_config(**changes), MLX_LM)
    moe.gate.weight = normal(EXPERTS, HIDDEN, seed=2, scale=HIDDEN**-0.5)
    moe.e_score_correction_bias = normal(EXPERTS, seed=3, scale=0.3)
    return moe


def route_formula(moe, x):
    """``{expert: weight}`` per token."""
    scores = sigmoid(float64(x) @ float64(moe.gate.weight).T)
    chosen = np.argsort(-(scores + float64(moe.e_score_correction_bias)), axis=-1)[:, :TOP]
    weights = np.take_along_axis(scores, chosen, axis=-1)
    weights = weights / weights.sum(axis=-1, keepdims=True) * moe.routed_scaling_factor
    return [dict(zip(e, w, strict=True)) for e, w in zip(chosen.tolist(), weights.tolist(), strict=True)]


def routed(moe, x):
    experts, weights = moe.route(x)
    assert weights.dtype == mx.float32
    return [dict(zip(e, w, strict=True)) for e, w in zip(experts.tolist(), weights.tolist(), strict=True)]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_route_is_the_formula_also_for_narrow_inputs(dtype):
    moe, x = router(), normal(100, HIDDEN, dtype=dtype)
    for ours, formula in zip(routed(moe, x), route_formula(moe, x), strict=True):
        assert ours == pytest.approx(formula, rel=1e-5)


def test_the_bias_takes_part_in_the_choice_only():
    moe, x = router(), normal(50, HIDDEN)
    moe.e_score_correction_bias = mx.zeros(EXPERTS).at[5].add(100.0)
    scores = sigmoid(float64(x) @ float64(moe.gate.weight).T)
    for token, weights in enumerate(routed(moe, x)):
        assert 5 in weights
        total = sum(scores[token, expert] for expert in weights)
        assert weights[5] == pytest.approx(2.0 * scores[token, 5] / total, rel=1e-5)


@pytest.mark.parametrize("factor", [1.0, 2.0, 2.5])
def test_weights_sum_to_the_routed_scaling_factor(factor):
    moe = router(routed_scaling_factor=factor)
    for weights in routed(moe, normal(50, HIDDEN)):
        assert len(weights) == TOP
        assert sum(weights.values()) == pytest.approx(factor, rel=1e-5)


def test_the_product_is_float32_for_bfloat16_inputs():
    """Expert 1 is ahead of expert 0 by less than bfloat16 can hold, on the last place."""
    moe = router()
    weight = np.full((EXPERTS, HIDDEN), -1.0, dtype=np.float32)
    weight[2:4] = 1.0
    weight[0], weight[1] = 0.01, 0.010001
    moe.gate.weight, moe.e_score_correction_bias = mx.array(weight), mx.zeros(EXPERTS)
    x = mx.ones((1, HIDDEN), dtype=mx.bfloat16)
    assert moe.gate.weight.astype(mx.bfloat16)[0, 0] == moe.gate.weight.astype(mx.bfloat16)[1, 0]
    assert routed(moe, x)[0].keys() == {1, 2, 3}


def test_scores_that_all_underflow_stay_finite():
    moe = router()
    moe.gate.weight = mx.full((EXPERTS, HIDDEN), -100.0)
    assert all(np.isfinite(list(weights.values())).all() for weights in routed(moe, mx.ones((2, HIDDEN))))


# --- mixture ---


def mlp_formula(x, gate, up, down):
    return swiglu_formula(x @ float64(gate).T, x @ float64(up).T) @ float64(down).T


def mixture(**changes) -> SparseMoeBlock:
    moe = router(**changes)
    for seed, projection in enumerate(("gate_proj", "up_proj", "down_proj")):
        for owner in (moe.switch_mlp, moe.shared_experts):
            module = owner[projection]
            module.weight = normal(*module.weight.shape, seed=10 + seed, scale=0.4)
    return moe


def test_mixture_is_the_formula():
    moe, x = mixture(), normal(2, 9, HIDDEN)
    tokens = float64(x).reshape(-1, HIDDEN)
    switch, shared = moe.switch_mlp, moe.shared_experts
    expected = mlp_formula(tokens, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
    for token, weights in enumerate(route_formula(moe, x.reshape(-1, HIDDEN))):
        for e, weight in weights.items():
            parts = (switch[name].weight[e] for name in ("gate_proj", "up_proj", "down_proj"))
            expected[token] += weight * mlp_formula(tokens[token], *parts)
    out = moe(x)
    assert out.shape == x.shape
    np.testing.assert_allclose(float64(out).reshape(-1, HIDDEN), expected, rtol=1e-4, atol=1e-4)


def test_the_shared_expert_is_not_scaled():
    moe, x = mixture(), normal(9, HIDDEN)
    moe.switch_mlp.down_proj.weight = mx.zeros_like(moe.switch_mlp.down_proj.weight)
    assert mx.allclose(moe(x), moe.shared_experts(x), atol=1e-6)


def test_the_routed_sum_is_scaled():
    once, twice, x = mixture(routed_scaling_factor=1.0), mixture(routed_scaling_factor=2.0), normal(9, HIDDEN)
    shared = once.shared_experts(x)
    assert mx.allclose(twice(x) - shared, 2 * (once(x) - shared), atol=1e-4)


def test_mixture_keeps_the_dtype():
    """Weights in bfloat16 beside the float32 router, as the checkpoints store them."""
    moe = mixture()
    moe.set_dtype(mx.bfloat16)
    moe.gate.weight = moe.gate.weight.astype(mx.float32)
    # gather_mm of MLX's CPU backend takes float32 only, so the routed part is left out here.
    moe.switch_mlp = lambda tokens, experts: mx.zeros((*experts.shape, HIDDEN), dtype=tokens.dtype)
    assert moe(normal(9, HIDDEN, dtype=mx.bfloat16)).dtype == mx.bfloat16


def test_dense_mlp_is_the_formula():
    mlp, x = DenseMLP(HIDDEN, 40, activation=SwiGLUOAI(small_config())), normal(5, HIDDEN)
    expected = mlp_formula(float64(x), mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
    assert mlp.gate_proj.weight.shape == (40, HIDDEN)
    np.testing.assert_allclose(float64(mlp(x)), expected, rtol=1e-4, atol=1e-5)
