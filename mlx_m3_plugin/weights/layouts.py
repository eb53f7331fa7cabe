"""Checkpoint layouts, each step a small rewrite of ``{name: Tensor}``.

Known here: the published layout, MXFP8, what ``mlx_lm.convert`` and ``mlx_vlm.convert``
write (experts stacked, gate and up apart or fused, the shared expert apart or as one more
row), dense MLPs stored under ``block_sparse_moe``, and text-only extractions.
"""

import re
from collections.abc import Iterable, Mapping

import mlx.core as mx

from ..model.config import TextConfig
from .tensor import Tensor

Plan = dict[str, Tensor]

# Parts of a checkpoint that a text model has no use for.
_UNUSED = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector|patch_merge_mlp|mtp)\.")
# Whatever stands before ``model.layers`` or ``lm_head`` in the stored names.
_TEXT_PREFIX = re.compile(r"^language_model\.(?=model\.|lm_head\.)")

_LAYER = re.compile(r"(?:^|\.)model\.layers\.(\d+)\.self_attn\.q_proj\.")

_PARTS = ("weight", "scales", "biases", "global_scale")
# Published name of an expert's projection -> MLX's.
_EXPERT_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def map_weights(weights: Mapping[str, mx.array], config: TextConfig, prefix: str) -> dict[str, mx.array]:
    """Apply :func:`plan_layout` to lazy arrays.  Applying it to its own output changes nothing."""
    return {name: tensor.make(weights) for name, tensor in plan_layout(weights, config, prefix).items()}


def plan_layout(weights: Mapping[str, mx.array], config: TextConfig, prefix: str) -> Plan:
    """How the parameters of the text model are made from the stored tensors.

    Args:
        weights: the stored tensors; only names, shapes and dtypes are looked at.
        config: the text config.
        prefix: what the model puts before ``model.layers`` and ``lm_head`` in its names.

    Returns:
        ``{parameter name: Tensor}``.  What no step knows keeps its name, for the check of
        missing and left-over tensors to name it.
    """
    plan = {
        _TEXT_PREFIX.sub("", name): Tensor.stored(name, array)
        for name, array in weights.items()
        if not _UNUSED.match(name)
    }
    if config.tie_word_embeddings:
        for part in _PARTS:
            plan.pop(f"lm_head.{part}", None)
    _read_mxfp8(plan)
    for layer in range(config.num_hidden_layers):
        base = f"model.layers.{layer}"
        if config.is_moe(layer):
            moe = f"{base}.block_sparse_moe"
            _stack_experts(plan, moe, config.num_local_experts)
            _take_out_shared_expert(plan, moe, config.num_local_experts)
            for owner in (f"{moe}.switch_mlp", f"{moe}.shared_experts"):
                _split_gate_up(plan, owner)
        else:
            _move_dense_mlp(plan, base)
    return {prefix + name: tensor for name, tensor in plan.items()}


def lacks_indexers(names: Iterable[str], config: TextConfig) -> bool:
    """Whether there are tensors of layers that are sparse by the config, and none of any indexer.

    Conversions by the early branches of mlx-lm have left them out.
    """
    in_sparse_layer = False
    for name in names:
        if ".self_attn.index_" in name:
            return False
        layer = _LAYER.search(name)
        if layer and config.is_sparse_attention(int(layer[1])):
            in_sparse_layer = True
    return in_sparse_layer


def _read_mxfp8(plan: Plan) -> None:
    """e4m3 bytes with one E8M0 exponent per 32 inputs are MLX's ``mxfp8``, byte for byte."""
    for name in [n for n in plan if n.endswith(".weight_scale_inv")]:
        base = name.removesuffix(".weight_scale_inv")
        weight = plan.get(f"{base}.weight")
        if weight is None or weight.dtype != str(mx.uint8) or plan[name].dtype != str(mx.uint8):
            continue
        plan[f"{base}.scales"] = plan.pop(name)
        plan[f"{base}.weight"] = weight.view_as_uint32()


def _stack_experts(plan: Plan, moe: str, num_experts: int) -> None:
    for stored, projection in _EXPERT_PROJECTIONS.items():
        for part in _PARTS:
            names = [f"{moe}.experts.{expert}.{stored}.{part}" for expert in range(num_experts)]
            # All or none: a missing expert is for the check to report.
            if not all(name in plan for name in names):
                continue
            tensors = [plan[name] for name in names]
            if len({(t.shape, t.dtype) for t in tensors}) == 1:
                plan[f"{moe}.switch_mlp.{projection}.{part}"] = Tensor.stack(tensors)
                for name in names:
                    del plan[name]


def _take_out_shared_expert(plan: Plan, moe: str, num_experts: int) -> None:
    """Some conversions store the shared expert as one more row; the expert axis is never packed."""
    for projection in ("gate_up_proj", "gate_proj", "up_proj", "down_proj"):
        for part in _PARTS:
            name = f"{moe}.switch_mlp.{projection}.{part}"
            experts = plan.get(name)
            if experts is not None and experts.shape[0] == num_experts + 1:
                plan[name] = experts.rows(0, num_experts)
                shared = experts.rows(num_experts, num_experts + 1).without_first_axis()
                plan[f"{moe}.shared_experts.{projection}.{part}"] = shared


def _split_gate_up(plan: Plan, owner: str) -> None:
    """Fused projections are concatenated: the first half of the output rows is the gate."""
    for part in ("weight", "scales", "biases"):
        fused = plan.pop(f"{owner}.gate_up_proj.{part}", None)
        if fused is not None:
            rows = fused.shape[-2]
            plan[f"{owner}.gate_proj.{part}"] = fused.rows(0, rows // 2, axis=-2)
            plan[f"{owner}.up_proj.{part}"] = fused.rows(rows // 2, rows, axis=-2)


def _move_dense_mlp(plan: Plan, base: str) -> None:
    for projection in ("gate_proj", "up_proj", "down_proj"):
        for part in _PARTS:
            tensor = plan.pop(f"{base}.block_sparse_moe.{projection}.{part}", None)
            if tensor is not None:
                plan[f"{base}.mlp.{projection}.{part}"] = tensor
