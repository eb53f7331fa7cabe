"""mlx-lm as a :class:`~mlx_m3_plugin.model.host.Host`."""

from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.rope_utils import initialize_rope
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_m3_plugin.model.host import Host

from . import cache

MLX_LM = Host(
    SwitchGLU=SwitchGLU,
    initialize_rope=initialize_rope,
    attention_mask=create_attention_mask,
    attention=scaled_dot_product_attention,
    kv_cache=cache.kv_cache,
    append_index_keys=cache.append_index_keys,
    adopt=cache.adopt,
)
