"""mlx-vlm as a :class:`~mlx_m3_plugin.model.host.Host`."""

from typing import Any

import mlx.core as mx
from mlx_vlm.models.base import create_attention_mask, scaled_dot_product_attention

from mlx_m3_plugin.model.host import Host
from mlx_m3_plugin.model.kv_cache import is_batch

from . import cache as caches
from . import parts


def attention(queries: mx.array, keys: Any, values: Any, *, cache: Any, scale: float, mask: Any) -> mx.array:
    """mlx-vlm's fused attention, for layers and steps that attend to everything.

    Raises:
        NotImplementedError: a batch with quantized K and V.  mlx-vlm has no such cache for
            MiniMax-M3; 0.6.4 would go on with the wrong masks.
    """
    if is_batch(cache) and "Quant" in type(cache).__name__:
        raise NotImplementedError(
            "MiniMax-M3 cannot quantize K and V in a batch: leave --kv-bits out, or send one request "
            "at a time"
        )
    return scaled_dot_product_attention(queries, keys, values, cache=cache, scale=scale, mask=mask)


initialize_rope, SwitchGLU = parts.rope_and_experts()

MLX_VLM = Host(
    SwitchGLU=SwitchGLU,
    initialize_rope=initialize_rope,
    attention_mask=create_attention_mask,
    attention=attention,
    kv_cache=caches.kv_cache,
    append_index_keys=caches.append_index_keys,
    adopt=caches.adopt,
)
