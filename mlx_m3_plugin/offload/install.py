"""Take the routed experts out of a model that is about to be loaded."""

import logging
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..model.decoder import DecoderLayer, TextModel
from ..model.memory import bytes_per_token, machine_memory, reserve_of, room_for_experts
from ..weights.check import compare, shape_and_kind
from ..weights.dtypes import size_in_bytes
from ..weights.headers import read_headers
from ..weights.quantization import infer_module, quantized_in
from ..weights.tensor import TensorPlan
from .experts import ExpertsOnDisk
from .slots import ExpertFiles, Slots

log = logging.getLogger("mlx_m3_plugin")


def put_experts_on_disk(
    model: TextModel, plan: TensorPlan, prefix: str, directory: Path, memory: int | str
) -> TensorPlan:
    """Replace the routed experts of ``model`` by :class:`ExpertsOnDisk`.

    Args:
        model: without weights, with all of its layers.
        plan: its parameters as they are stored in ``directory``.
        prefix: what comes before ``model.layers`` in their names.
        memory: bytes for experts, which all layers share evenly; or ``"auto"``.

    Returns:
        The plan without those experts; ``plan`` itself where all of them fit into ``memory``, or where they
        are incomplete, which the check before loading reports.

    Raises:
        ValueError: not even one expert of each layer fits.
    """
    blocks = {
        f"{prefix}model.layers.{number}.block_sparse_moe.switch_mlp.": layer
        for number, layer in enumerate(model.layers)
        if layer.is_moe
    }
    planned = {
        base: {name.removeprefix(base): t for name, t in plan.items() if name.startswith(base)}
        for base in blocks
    }
    total = sum(size_in_bytes(t.shape, t.dtype) for of_layer in planned.values() for t in of_layer.values())
    if isinstance(memory, str):
        others = sum(size_in_bytes(t.shape, t.dtype) for t in plan.values()) - total
        memory = _room_for_experts(model, others)
    if total <= memory:
        return plan
    quantized = {base: _quantized(blocks[base], of_layer) for base, of_layer in planned.items()}
    if not all(quantized.values()):
        return plan
    n_experts = model.config.num_local_experts
    count = n_experts * memory // total
    if count < 1:
        raise ValueError(
            "MLX_M3_PLUGIN_EXPERT_MEMORY is too small: "
            f"{max(0, memory):,} bytes, and one expert of each layer takes {total // n_experts:,} bytes"
        )
    experts = {base + name: t for base, of_layer in planned.items() for name, t in of_layer.items()}
    files = ExpertFiles(directory, read_headers(directory).tensors, experts)
    for base, of_layer in planned.items():
        block = blocks[base].block_sparse_moe
        block.switch_mlp.update_modules(quantized[base])
        block.switch_mlp = ExpertsOnDisk(Slots(block.switch_mlp, of_layer, count, files))
    log.warning(
        "mlx-m3-plugin: %d of %d experts of each layer are in memory (%.1f of %.1f GiB), the others on disk",
        *(count, n_experts, count * total / n_experts / 2**30, total / 2**30),
    )
    return {name: tensor for name, tensor in plan.items() if name not in experts}


def _room_for_experts(model: TextModel, others: int) -> int:
    """What this machine has left beside the ``others`` bytes of weights and some context."""
    per_token = bytes_per_token(model.config, sum(layer.self_attn.is_sparse_attn for layer in model.layers))
    machine = machine_memory() or 0
    # What macOS lets a GPU keep in memory.
    kept = mx.device_info().get("max_recommended_working_set_size", machine)
    return room_for_experts(model.config, min(machine - reserve_of(machine), int(kept)), others, per_token)


def _quantized(layer: DecoderLayer, planned: TensorPlan) -> dict[str, nn.Module]:
    """The matrices of a layer's experts, quantized as they are stored; none if something else is stored."""
    made = {name: m for name, m in layer.block_sparse_moe.switch_mlp.children().items() if "weight" in m}
    for name in set(quantized_in(planned)) & made.keys():
        made[name] = made[name].to_quantized(**infer_module(name, planned, made[name].weight.shape))
    parameters = dict(tree_flatten({name: linear.parameters() for name, linear in made.items()}))
    found = compare(planned, {name: shape_and_kind(array) for name, array in parameters.items()})
    return {} if found.missing or found.left_over or found.wrong else made
