"""Checkpoint layouts, each step a small rewrite of ``{name: Tensor}``.

``docs/layouts.md`` lists what is in circulation.  No step looks at a repository's name or at a
flag: key names, shapes and dtypes say what a checkpoint is.
"""

from collections.abc import Container, Mapping

from ..model.config import TextConfig
from .formats import read_formats
from .names import (
    EXPERT_PROJECTIONS,
    TEXT_PREFIX,
    draft_parameter,
    is_text,
    is_unused,
    is_vision,
    layer_of,
    published_name,
)
from .quantization import PARTS
from .tensor import HasShape, Tensor, TensorPlan


def plan_layout(
    weights: Mapping[str, HasShape],
    config: TextConfig,
    prefix: str,
    *,
    vision: bool = False,
    layers: Container[int] | None = None,
) -> TensorPlan:
    """Plan how the model's parameters are made from the stored tensors.

    Args:
        weights: the stored tensors; only names, shapes and dtypes are looked at.
        config: the text config.
        prefix: what the model puts before ``model.layers`` and ``lm_head`` in its names.
        vision: keep the vision tower and the projectors, under their published names.
        layers: numbers of those to map, where a process runs some; the others may be incomplete.

    Returns:
        ``{parameter name: Tensor}``.  What no step knows keeps its name: the check of missing
        and left-over tensors reports it.

    Raises:
        ValueError: a tensor is stored twice, or in a format that MLX has no mode for.
    """
    stored: dict[str, str] = {}
    for name in weights:
        if is_unused(name):
            continue
        first = stored.setdefault(published_name(name, config), name)
        if first != name:
            raise ValueError(
                f"this checkpoint has the same tensor twice, as {first} and as {name}; remove one"
            )
    plan = {
        new: Tensor.stored(name, weights[name])
        for new, name in stored.items()
        if layers is None or (layer := layer_of(new)) is None or layer in layers
    }
    in_vision = {name: plan.pop(name) for name in list(plan) if is_vision(name)}
    if config.tie_word_embeddings:
        for part in PARTS:
            plan.pop(f"lm_head.{part}", None)
    read_formats(plan, config)
    if (scale := plan.get("model.embed_tokens.global_scale")) is not None:
        raise ValueError(f"MLX has no tensor scale for embeddings: {scale}")
    for layer in range(config.num_hidden_layers):
        base = f"model.layers.{layer}"
        if config.is_moe(layer):
            moe = f"{base}.block_sparse_moe"
            _stack_experts(plan, moe, config.num_local_experts)
            _take_out_shared_expert(plan, moe, config.num_local_experts)
            _split_gate_up(plan, f"{moe}.switch_mlp")
            _split_gate_up(plan, f"{moe}.shared_experts")
        else:
            _split_gate_up(plan, f"{base}.mlp")
    # A name that is not the text model's is left as it is stored.
    text = {prefix + name if is_text(name) else name: tensor for name, tensor in plan.items()}
    return {**text, **in_vision} if vision else text


def plan_draft(weights: Mapping[str, HasShape], config: TextConfig) -> TensorPlan:
    """Plan how the parameters of a DSpark draft head are made from its stored tensors.

    Args:
        config: that of the head's own layers.

    Raises:
        ValueError: as :func:`plan_layout`.
    """
    plan: TensorPlan = {}
    for name, tensor in weights.items():
        new = draft_parameter(name)
        _add(plan, new, Tensor.stored(name, tensor), name)
    read_formats(plan, config)
    return plan


def lacks_indexers(plan: Mapping[str, object], config: TextConfig) -> bool:
    """Whether no tensor of any indexer is among these names, though the config has sparse layers.

    Conversions by early branches of mlx-lm lack them.  Names may carry a prefix.
    """
    in_sparse_layer = False
    for name in plan:
        if ".self_attn.index_" in name:
            return False
        layer = layer_of(name.removeprefix(TEXT_PREFIX))
        # Known by the query projection beside it: some tools map a few tensors at a time.
        if layer is not None and ".self_attn.q_proj." in name and config.is_sparse_attention(layer):
            in_sparse_layer = True
    return in_sparse_layer


def pack_experts(plan: TensorPlan, config: TextConfig, prefix: str) -> TensorPlan | None:
    """The way back: gate and up in one ``gate_up_proj``, and the shared expert as one more expert.

    mlx-vlm stores experts like this by default.  Exact on quantized tensors: rows are never packed
    together.  None where gate and up, or a shared and the routed experts, differ in shape or dtype.
    """
    packed = dict(plan)
    for layer in filter(config.is_moe, range(config.num_hidden_layers)):
        moe = f"{prefix}model.layers.{layer}.block_sparse_moe"
        for part in PARTS:
            stacks = {}
            for projection in EXPERT_PROJECTIONS.values():
                routed = packed.get(f"{moe}.switch_mlp.{projection}.{part}")
                shared = packed.pop(f"{moe}.shared_experts.{projection}.{part}", None)
                if routed and shared and (routed.shape[1:], routed.dtype) == (shared.shape, shared.dtype):
                    stacks[projection] = Tensor.concatenate([routed, shared.reshape(1, *shared.shape)])
                elif routed or shared:
                    return None
            gate, up = stacks.pop("gate_proj", None), stacks.pop("up_proj", None)
            # Together they would have one tensor scale.
            if gate and up and (gate.shape, gate.dtype) == (up.shape, up.dtype) and part != "global_scale":
                del packed[f"{moe}.switch_mlp.gate_proj.{part}"], packed[f"{moe}.switch_mlp.up_proj.{part}"]
                packed[f"{moe}.switch_mlp.gate_up_proj.{part}"] = Tensor.concatenate([gate, up], axis=-2)
            elif gate or up:
                return None
            packed |= {f"{moe}.switch_mlp.{projection}.{part}": t for projection, t in stacks.items()}
    return packed


def _stack_experts(plan: TensorPlan, moe: str, num_experts: int) -> None:
    for stored, projection in EXPERT_PROJECTIONS.items():
        for part in PARTS:
            names = [f"{moe}.experts.{expert}.{stored}.{part}" for expert in range(num_experts)]
            # All or none: the check before loading reports a missing expert.
            if not all(name in plan for name in names):
                continue
            tensors = [plan[name] for name in names]
            if len({(t.shape, t.dtype) for t in tensors}) == 1:
                _add(plan, f"{moe}.switch_mlp.{projection}.{part}", Tensor.stack(tensors), names[0])
                for name in names:
                    del plan[name]


def _take_out_shared_expert(plan: TensorPlan, moe: str, num_experts: int) -> None:
    """Some conversions store the shared expert after the routed ones, on an axis that is never packed."""
    for projection in ("gate_up_proj", "gate_proj", "up_proj", "down_proj"):
        for part in PARTS:
            name = f"{moe}.switch_mlp.{projection}.{part}"
            experts = plan.get(name)
            if experts is not None and experts.shape[:1] == (num_experts + 1,):
                plan[name] = experts.slice(0, num_experts)
                shared = experts.slice(num_experts, num_experts + 1).reshape(*experts.shape[1:])
                _add(plan, f"{moe}.shared_experts.{projection}.{part}", shared, name)


def _split_gate_up(plan: TensorPlan, owner: str) -> None:
    """Fused projections are concatenated: the first half of the outputs is the gate."""
    for part in ("weight", "scales", "biases"):
        fused = plan.get(f"{owner}.gate_up_proj.{part}")
        if fused is not None and len(fused.shape) > 1:
            del plan[f"{owner}.gate_up_proj.{part}"]
            middle, end = fused.shape[-2] // 2, fused.shape[-2]
            for projection, start, stop in (("gate_proj", 0, middle), ("up_proj", middle, end)):
                half = fused.slice(start, stop, axis=-2)
                _add(plan, f"{owner}.{projection}.{part}", half, f"{owner}.gate_up_proj.{part}")
    # Both halves share a tensor scale, which belongs to a whole matrix.
    shared = f"{owner}.gate_up_proj.global_scale"
    if shared in plan and f"{owner}.gate_proj.weight" in plan:
        scale = plan.pop(shared)
        plan.update({f"{owner}.{half}.global_scale": scale for half in ("gate_proj", "up_proj")})


def _add(plan: TensorPlan, name: str, tensor: Tensor, made_from: str) -> None:
    if name in plan:
        raise ValueError(
            f"this checkpoint has the same tensor twice, as {name} and in {made_from}; remove one"
        )
    plan[name] = tensor
