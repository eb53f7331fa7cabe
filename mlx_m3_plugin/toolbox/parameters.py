"""The parameters of a model, how a checkpoint stores them, and what is wrong with them.

Names are the published ones without a prefix.  Shapes are those before any quantization.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..model.config import TextConfig, text_part
from ..model.decoder import LanguageModel
from ..weights.check import ShapeAndKind, compare, group_names, kind_of
from ..weights.dtypes import size_in_bytes
from ..weights.headers import Headers
from ..weights.names import layer_of
from ..weights.quantization import PARTS, infer_module, quantized_in
from ..weights.tensor import Tensor
from .precision import Quantization

Shapes = dict[str, tuple[int, ...]]

# Component -> what the published names of its tensors contain; the longest match decides.
# In the order in which a token meets them.
COMPONENTS = {
    "embeddings": (".embed_tokens.",),
    "attention": (".self_attn.",),
    "indexer": (".self_attn.index_",),
    "dense MLP": (".mlp.",),
    "router": (".block_sparse_moe.gate.", ".e_score_correction_bias"),
    "routed experts": (".switch_mlp.", ".experts."),
    "shared expert": (".shared_experts.",),
    "norms": ("_layernorm.", "model.norm."),
    "lm_head": ("lm_head.",),
    "vision tower": ("vision_tower.",),
    "projector": ("multi_modal_projector.",),
    "patch merge": ("patch_merge_mlp.",),
}
OTHER = "other"
# What mlx-lm does not load.
NOT_IN_THE_TEXT_MODEL = ("vision tower", "projector", "patch merge", OTHER)


def component_of(name: str) -> str:
    """The part of the model that a published tensor name belongs to."""
    found = [
        (len(part), component)
        for component, parts in COMPONENTS.items()
        for part in parts
        if part in f".{name}"
    ]
    return max(found, default=(0, OTHER))[1]


def bytes_of_components(headers: Headers, plan: Mapping[str, Tensor]) -> dict[str, int]:
    """Of all tensors; what is not in the plan, such as heads for multi-token prediction, is ``OTHER``."""
    sizes = dict.fromkeys((*COMPONENTS, OTHER), 0)
    for name, tensor in plan.items():
        sizes[component_of(name)] += size_in_bytes(tensor.shape, tensor.dtype)
    sizes[OTHER] += headers.nbytes - sum(sizes.values())
    return sizes


def text_shapes(config: TextConfig, *, indexers: bool = True) -> Shapes:
    """Shapes of the text model's parameters, with experts stacked.

    They are those of the model itself, which is built without computing a weight.

    Args:
        indexers: False for a checkpoint without indexer weights.

    Raises:
        ValueError: a size in the config is too large for MLX.
    """
    try:
        model = LanguageModel(config, _SHAPES_ONLY)
    except OverflowError as error:
        raise ValueError(f"config: a size is out of range ({error})") from None
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    shapes = {name: array.shape for name, array in parameters.items()}
    # Conversions are written in this order: what is outside of the layers first, then each layer's norms.
    order = {
        name: (-1 if (layer := layer_of(name)) is None else layer, "layernorm" not in name) for name in shapes
    }
    names = sorted((n for n in shapes if indexers or ".index_" not in n), key=order.__getitem__)
    return {name: shapes[name] for name in names}


class _Experts(nn.Module):
    """The parameters of a host's ``SwitchGLU``."""

    def __init__(self, hidden: int, width: int, experts: int, activation: nn.Module):
        super().__init__()
        for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            self[f"{name}_proj"] = {"weight": mx.zeros((experts, *shape))}


# Stands in for mlx-lm or mlx-vlm, which need not be installed here: all that building a model asks of a host.
_SHAPES_ONLY: Any = SimpleNamespace(SwitchGLU=_Experts, initialize_rope=lambda **options: nn.Identity())


def vision_shapes(config: Mapping[str, Any]) -> Shapes:
    """Those of the vision tower and the projectors, from the whole ``config.json``.

    What the config does not say is as in the released M3.

    Raises:
        ValueError: a size is not a number.
    """
    try:
        return dict(_vision(config))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"config: vision_config does not describe a vision tower ({error})") from None


def _vision(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    vision, text = config.get("vision_config") or {}, text_part(config)
    merging = vision.get("img_token_compression_config") or config.get("img_token_compression_config") or {}
    hidden, wide = vision.get("hidden_size", 1280), vision.get("intermediate_size", 5120)
    frames = vision.get("temporal_patch_size", merging.get("temporal_patch_size", 2))
    side = vision.get("patch_size", 14)
    tower = "vision_tower.vision_model"
    patch = (vision.get("num_channels", 3), frames, side, side)
    yield f"{tower}.embeddings.patch_embedding.weight", (hidden, *patch)
    yield from _with_bias(f"{tower}.pre_layrnorm", hidden)
    for layer in range(vision.get("num_hidden_layers", 32)):
        base = f"{tower}.encoder.layers.{layer}"
        for norm in ("layer_norm1", "layer_norm2"):
            yield from _with_bias(f"{base}.{norm}", hidden)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _with_bias(f"{base}.self_attn.{projection}", hidden, hidden)
        yield from _with_bias(f"{base}.mlp.fc1", wide, hidden)
        yield from _with_bias(f"{base}.mlp.fc2", hidden, wide)

    out = text.get("hidden_size", TextConfig.hidden_size)
    between = config.get("projector_hidden_size", out)
    merged = vision.get("spatial_merge_size", merging.get("spatial_merge_size", 2)) ** 2 * out
    yield from _with_bias("multi_modal_projector.linear_1", between, hidden)
    yield from _with_bias("multi_modal_projector.linear_2", out, between)
    yield from _with_bias("patch_merge_mlp.linear_1", between, merged)
    yield from _with_bias("patch_merge_mlp.linear_2", out, between)


def _with_bias(module: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{module}.weight", shape
    yield f"{module}.bias", shape[:1]


# --- how they are stored ---


class StoredModel:
    """What a checkpoint and a draft head have in common; both are dataclasses with these fields.

    Attributes:
        plan: parameter names -> how they are made from stored tensors.
        quantized: the modules that are quantized in one of MLX's modes.
    """

    plan: Mapping[str, Tensor]
    quantized: Mapping[str, Quantization]

    def parts(self, module: str) -> dict[str, Tensor]:
        """The tensors of a module by part: ``weight``, and those that belong to a quantized one."""
        return {part: self.plan[name] for part in PARTS if (name := f"{module}.{part}") in self.plan}

    def spec(self, module: str) -> Quantization:
        """How a module's weight is stored."""
        return self.quantized.get(module, Quantization())

    def float_dtype(self, module: str) -> mx.Dtype:
        """The dtype of a module's weight, or of what it is dequantized to."""
        spec = self.quantized.get(module)
        if spec is None:
            return self.plan[f"{module}.weight"].dtype
        return self.plan[f"{module}.scales"].dtype if spec.mode == "affine" else mx.bfloat16


def quantized_modules(
    plan: Mapping[str, Tensor], shapes: Shapes
) -> tuple[dict[str, Quantization], list[str]]:
    """The quantization of each quantized module, and a line for each that MLX could not have quantized."""
    quantized, problems = {}, []
    for module in quantized_in(plan):
        if (shape := shapes.get(f"{module}.weight")) is None:
            continue
        try:
            found = infer_module(module, plan, shape)
        except ValueError as error:
            problems.append(str(error))
        else:
            scaled = found.pop("global_scale", False) and found["mode"] == "nvfp4"
            quantized[module] = Quantization(**found, tensor_scales=scaled)
    return quantized, problems


def differences(
    plan: Mapping[str, Tensor], shapes: Shapes, quantized: Mapping[str, Quantization], prefix: str = ""
) -> list[str]:
    """What is missing, left over, or of a wrong shape or dtype: one line for each kind of module.

    ``prefix`` goes before the names of parameters, as the checkpoint's model type has them.
    """
    found = compare(plan, expected_parameters(plan, shapes, quantized))
    missing = group_names(prefix + name for name in found.missing)
    left_over = group_names(stored for name in found.left_over for stored in plan[name].stored_names())
    wrong: dict[str, list[str]] = defaultdict(list)
    for name, (has, wants) in found.wrong.items():
        is_, not_ = (f"{kind}{list(shape)}" for shape, kind in (has, wants))
        wrong[f"is {is_}, not {not_}"].append(prefix + name)
    return [
        *(f"missing: {line}" for line in missing),
        *(f"left over: {line}" for line in left_over),
        *(f"{line} {spec}" for spec, names in sorted(wrong.items()) for line in group_names(names)),
    ]


def expected_parameters(
    plan: Mapping[str, Tensor], shapes: Shapes, quantized: Mapping[str, Quantization]
) -> dict[str, ShapeAndKind | None]:
    """The parameters of the loaded model: those of ``shapes``, quantized as ``quantized`` says.

    Returns:
        Name -> shape and kind of dtype; None where the quantization is wrong, which
        :func:`quantized_modules` reports.
    """
    expected: dict[str, ShapeAndKind | None] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if (spec := quantized.get(module)) is not None:
            parts = spec.parts(shape, mx.bfloat16)
            expected |= {f"{module}.{part}": (size, kind_of(dtype)) for part, (size, dtype) in parts.items()}
        elif name in plan and f"{module}.scales" in plan:
            names = (f"{module}.{part}" for part in PARTS)
            expected |= dict.fromkeys(part for part in names if part in plan)
        else:
            expected[name] = shape, kind_of(mx.bfloat16)
    return expected
