"""``TextConfig``: an M3 text config, read from any of its spellings.

Three spellings are in use: the published one (nested ``sparse_attention_config``,
``moe_layer_freq``), the one that transformers 5.x writes (flat ``index_*`` keys,
``layer_types``, ``mlp_layer_types``, ``rope_parameters``), and either of them kept by an
MLX conversion.  The attributes here carry transformers' names.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from inspect import Parameter, Signature
from typing import Any, ClassVar

# Attribute -> its keys in a config, where they are not just its own name.  The ``sparse_`` ones are
# inside ``sparse_attention_config``.
_KEYS = {
    "rotary_dim": ("rotary_dim", "partial_rotary_factor"),
    "index_n_heads": ("sparse_num_index_heads", "index_n_heads"),
    "index_head_dim": ("sparse_index_dim", "index_head_dim"),
    "index_block_size": ("sparse_block_size", "index_block_size"),
    "index_topk_blocks": ("sparse_topk_blocks", "index_topk_blocks"),
    "index_local_blocks": ("sparse_local_block", "index_local_blocks", "sparse_local_tokens"),
    "index_init_blocks": ("sparse_init_block", "index_init_blocks", "sparse_init_tokens"),
}
# Read as blocks, rounded up, where a config does not give blocks.  As in SGLang.
_IN_TOKENS = {"index_local_blocks": "sparse_local_tokens", "index_init_blocks": "sparse_init_tokens"}
_LAYER_LISTS = ("moe_layer_freq", "mlp_layer_types", "layer_types", "sparse_attention_freq")

_ATTENTION_BY_NAME = {
    "minimax_m3_sparse": "minimax_m3_sparse",
    "full_attention": "full_attention",
    "minimax_m3_dense": "full_attention",
}
_MAY_BE_ZERO = ("index_local_blocks", "index_init_blocks", "n_shared_experts")

# Options that change the computation and have one value in every released M3.  Any other
# value is refused, because the answers would be wrong without a sign of it.
_ONLY_KNOWN_VALUE: dict[str, tuple[Any, ...]] = {
    "attention_output_gate": (False,),
    "scoring_func": ("sigmoid",),
    "use_routing_bias": (True,),
    "qk_norm_type": ("per_head",),
    # transformers writes "silu" into every re-saved config, whatever the model computes.
    "hidden_act": ("swigluoai", "silu"),
    "swiglu_beta": (1,),
    "n_shared_experts": (0, 1),
}


@dataclass(init=False)
class TextConfig:
    """Shape and constants of the text model.

    It is made from the keys of a text config in any spelling, and has the attributes of the classes of
    this name in mlx-lm (``TextArgs``), mlx-vlm and transformers.  What is left out has the value of
    transformers' ``MiniMaxM3VLTextConfig``, which are those of the released M3.

    Raises:
        ValueError: a key has a wrong type, or a value that this model does not compute.

    Attributes:
        host: what layers are built from that are made without a ``Host``; set by the subclasses of a host.
        layer_types: per layer ``"minimax_m3_sparse"`` or ``"full_attention"``.
        mlp_layer_types: per layer ``"sparse"`` (mixture of experts) or ``"dense"``.
        rope_parameters: what ``initialize_rope`` of the host takes, e.g. ``{"rope_type":
            "yarn", ...}``; ``rope_theta`` and ``rotary_dim`` are already taken out of it.
        rotary_dim: number of leading channels of a head that are rotated.
        index_n_heads: index query heads, one per KV group.
        index_block_size: keys per block, in tokens.
        index_topk_blocks: the block budget of a query.
        index_local_blocks: blocks up to the query's own that count as always chosen.
        index_init_blocks: blocks at the start that count as always chosen (0 in M3).
        attention: ``"sparse"``, or ``"dense"`` to attend to everything on every layer, which is
            the same up to the block budget and not what the model was trained with beyond it.
        pipeline_split: layers by rank of a pipeline; None splits evenly.  Set by the user, not by a config.
    """

    host: ClassVar[Any] = None

    model_type: str = "minimax_m3_vl_text"
    vocab_size: int = 200064
    hidden_size: int = 6144
    num_hidden_layers: int = 60
    num_attention_heads: int = 64
    num_key_value_heads: int = 4
    head_dim: int = 128
    dense_intermediate_size: int = 12288
    intermediate_size: int = 3072
    shared_intermediate_size: int = 3072
    num_local_experts: int = 128
    num_experts_per_tok: int = 4
    n_shared_experts: int = 1
    routed_scaling_factor: float = 2.0
    rms_norm_eps: float = 1e-6
    use_gemma_norm: bool = True
    use_qk_norm: bool = True
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    max_position_embeddings: int = 1048576
    rope_theta: float = 5000000.0
    rope_parameters: dict[str, Any] = field(default_factory=dict)
    rotary_dim: int = 64
    tie_word_embeddings: bool = False
    layer_types: list[str] = field(default_factory=list)
    mlp_layer_types: list[str] = field(default_factory=list)
    index_n_heads: int = 4
    index_head_dim: int = 128
    index_block_size: int = 128
    index_topk_blocks: int = 16
    index_local_blocks: int = 1
    index_init_blocks: int = 0
    attention: str = "sparse"
    pipeline_split: tuple[int, ...] | None = None

    def __init__(self, **params: Any):
        sparse = _mapping(params, "sparse_attention_config")
        n_layers = _n_layers(params, sparse)
        _refuse_unknown_values(params, sparse, n_layers)
        defaults = {f.name: f.default for f in fields(TextConfig)}
        given = {key: value for key, value in params.items() if key in defaults and value is not None}
        given |= {name: sparse[key] for name, (key, *_) in _KEYS.items() if key in sparse}
        if given.get("index_block_size", 0) is None:
            # Dense, as for mlx-lm's class; see ``_layer_types``.
            del given["index_block_size"]
        vars(self).update(defaults | _blocks_from_tokens({**params, **sparse}, given) | given)
        self.num_hidden_layers = n_layers
        self.layer_types = _layer_types(params, sparse, n_layers)
        self.mlp_layer_types = _mlp_layer_types(params, n_layers)
        vars(self).update(_rope(params, _integer(self.head_dim, "head_dim")))
        self._check_types()
        self._check_sizes()

    @classmethod
    def from_dict(cls, params: Mapping[str, Any]) -> "TextConfig":
        """As the constructor, from a config file, which does not set ``pipeline_split``."""
        return cls(**{**params, "pipeline_split": None})

    @property
    def budget(self) -> int:
        """Tokens that a query may attend to on a sparse layer."""
        return self.index_topk_blocks * self.index_block_size

    def is_sparse_attention(self, layer: int) -> bool:
        return self.layer_types[layer] != "full_attention"

    def is_moe(self, layer: int) -> bool:
        return self.mlp_layer_types[layer] == "sparse"

    # --- what other packages read of mlx-lm's and mlx-vlm's classes ---

    is_sparse_attn = has_sparse_index = is_sparse_attention
    is_moe_layer = is_moe

    @property
    def partial_rotary_factor(self) -> float:
        return self.rotary_dim / self.head_dim

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        return self.rope_parameters or None

    @property
    def moe_layer_freq(self) -> list[int]:
        return [int(kind == "sparse") for kind in self.mlp_layer_types]

    @property
    def sparse_attention_freq(self) -> list[int]:
        return [int(kind != "full_attention") for kind in self.layer_types]

    @property
    def sparse_attention_config(self) -> dict[str, Any]:
        freq = self.sparse_attention_freq
        return {
            "use_sparse_attention": any(freq),
            "sparse_attention_freq": freq,
            "sparse_disable_index_value": freq,
            "sparse_score_type": "max",
            **{key: getattr(self, name) for name, (key, *_) in _KEYS.items() if key.startswith("sparse_")},
        }

    def __getattr__(self, name: str) -> Any:
        if name not in _ONLY_KNOWN_VALUE:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return _ONLY_KNOWN_VALUE[name][0]

    def _check_types(self) -> None:
        for f in fields(self):
            key, value = _key(f.name), getattr(self, f.name)
            if f.type is int:
                _integer(value, key, at_least=0 if f.name in _MAY_BE_ZERO else 1)
            elif f.type is float:
                _expect(_is_number(value) and 0 < value < math.inf, key, "a positive number", value)
            elif f.type is bool:
                _expect(isinstance(value, bool), key, "true or false", value)
        _expect(self.attention in ("sparse", "dense"), "attention", "'sparse' or 'dense'", self.attention)

    def _check_sizes(self) -> None:
        """Sizes that must fit each other."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        chosen, experts = self.num_experts_per_tok, self.num_local_experts
        rotated, head_dim = self.rotary_dim, self.head_dim
        _check(
            heads % kv_heads == 0,
            f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})",
        )
        _check(
            chosen <= experts, f"num_experts_per_tok ({chosen}) is larger than num_local_experts ({experts})"
        )
        _check(
            rotated <= head_dim and rotated % 2 == 0,
            f"{_key('rotary_dim')} asks for {rotated} rotated channels, which do not fit a head_dim of "
            f"{head_dim}",
        )
        if "minimax_m3_sparse" not in self.layer_types:
            return
        _check(
            self.index_n_heads == kv_heads,
            f"index_n_heads is {self.index_n_heads} and num_key_value_heads is {kv_heads}; block selection "
            "needs one index head per KV head",
        )
        _check(
            self.index_head_dim >= rotated,
            f"index_head_dim ({self.index_head_dim}) is smaller than the {rotated} rotated channels",
        )
        forced = self.index_local_blocks + self.index_init_blocks
        _check(
            forced <= self.index_topk_blocks,
            f"{forced} local and initial blocks are always chosen, but index_topk_blocks is "
            f"{self.index_topk_blocks}",
        )


# Many tools pass only those keys of a config that a class names.
_ACCEPTED = {*(f.name for f in fields(TextConfig)), *_LAYER_LISTS, *_ONLY_KNOWN_VALUE}
_ACCEPTED |= {"sparse_attention_config", "rope_scaling", *(key for keys in _KEYS.values() for key in keys)}
TextConfig.__init__.__signature__ = Signature(  # type: ignore[attr-defined]
    [Parameter("self", Parameter.POSITIONAL_ONLY)]
    + [Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in sorted(_ACCEPTED)]
)


def text_config_of(config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> TextConfig:
    """The text config of a checkpoint's ``config.json``, nested under ``text_config`` or flat.

    ``attention`` at the top of the config, where mlx-lm's ``load_model(model_config=...)`` puts an
    override, chooses between dense and sparse.

    Args:
        overrides: attributes that the user has set; they win over the config.

    Raises:
        ValueError: a key has a wrong type, or a value that this model does not compute.
    """
    part = text_part(config)
    text = dict(part)
    if part is not config:
        # transformers keeps this one at the top of a re-saved config.
        text.setdefault("tie_word_embeddings", config.get("tie_word_embeddings", False))
    if config.get("attention") is not None:
        text["attention"] = config["attention"]
    return replace(TextConfig.from_dict(text), **(overrides or {}))


def uncut_lists(config: Mapping[str, Any]) -> list[str]:
    """Keys of lists with entries for more layers than the model has, of which the first ones count.

    Raises:
        ValueError: the number of layers is not a number.
    """
    text = text_part(config)
    sparse = _mapping(text, "sparse_attention_config")
    n_layers = _n_layers(text, sparse)
    return [key for key, entries in _layer_lists(text, sparse).items() if len(entries) > n_layers]


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """``text_config``, or all of a flat config.  Loaders add a ``text_config`` with little in it to those."""
    nested = _mapping(config, "text_config")
    is_flat = "num_hidden_layers" in config and "num_hidden_layers" not in nested
    return nested if config.get("text_config") is not None and not is_flat else config


def _layer_lists(params: Mapping[str, Any], sparse: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    found = {key: sparse.get(key, params.get(key)) for key in _LAYER_LISTS}
    return {key: entries for key, entries in found.items() if isinstance(entries, (list, tuple))}


def _n_layers(params: Mapping[str, Any], sparse: Mapping[str, Any]) -> int:
    """As many as the lists have entries, where a config does not say."""
    listed = min(map(len, _layer_lists(params, sparse).values()), default=TextConfig.num_hidden_layers)
    given = params.get("num_hidden_layers")
    return _integer(listed if given is None else given, "num_hidden_layers")


def _key(attribute: str) -> str:
    """As a config has it: ``sparse_block_size or index_block_size``."""
    return " or ".join(_KEYS.get(attribute, (attribute,)))


def _layer_types(params: Mapping[str, Any], sparse: Mapping[str, Any], n_layers: int) -> list[str]:
    is_used = sparse.get("use_sparse_attention", True)
    _expect(is_used in (True, False, None), "use_sparse_attention", "true or false", is_used)
    block_size = sparse.get("sparse_block_size", params.get("index_block_size", TextConfig.index_block_size))
    if block_size is None or not (is_used or is_used is None):
        return ["full_attention"] * n_layers
    freq = sparse.get("sparse_attention_freq", params.get("sparse_attention_freq"))
    if params.get("layer_types") is not None:
        return _per_layer(params["layer_types"], "layer_types", n_layers, _ATTENTION_BY_NAME)
    if freq is not None:
        kinds = {0: "full_attention", 1: "minimax_m3_sparse"}
        return _per_layer(freq, "sparse_attention_freq", n_layers, kinds)
    if sparse:
        raise ValueError(
            "config: sparse_attention_config lacks sparse_attention_freq, the layers that are sparse"
        )
    # As in transformers: without any mention of sparse layers there are none.
    return ["full_attention"] * n_layers


def _mlp_layer_types(params: Mapping[str, Any], n_layers: int) -> list[str]:
    if params.get("mlp_layer_types") is not None:
        kinds = {"sparse": "sparse", "dense": "dense"}
        return _per_layer(params["mlp_layer_types"], "mlp_layer_types", n_layers, kinds)
    if params.get("moe_layer_freq") is not None:
        return _per_layer(params["moe_layer_freq"], "moe_layer_freq", n_layers, {0: "dense", 1: "sparse"})
    return ["sparse"] * n_layers


def _per_layer(value: Any, key: str, n_layers: int, kinds: Mapping[Any, str]) -> list[str]:
    """Of the first entries: checkpoints with the first layers of a model may have the lists for all."""
    is_list = isinstance(value, (list, tuple)) and len(value) >= n_layers
    _check(is_list, f"{key} must be a list with one entry for each of {n_layers} layers")
    for entry in value[:n_layers]:
        _check(entry in [*kinds], f"{key} holds {entry!r}; allowed are {', '.join(map(repr, kinds))}")
    return [kinds[entry] for entry in value[:n_layers]]


def _blocks_from_tokens(params: Mapping[str, Any], read: Mapping[str, Any]) -> dict[str, int]:
    size = _integer(read.get("index_block_size", TextConfig.index_block_size), _key("index_block_size"))
    given = {
        attribute: _integer(params[key], key, at_least=0)
        for attribute, key in _IN_TOKENS.items()
        if attribute not in read and params.get(key) is not None
    }
    return {attribute: -(-tokens // size) for attribute, tokens in given.items()}


def _rope(params: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """``rope_theta``, ``rotary_dim`` and ``rope_parameters`` in transformers' order of precedence."""
    rope = dict(_mapping(params, "rope_scaling") or _mapping(params, "rope_parameters"))
    theta = rope.pop("rope_theta", params.get("rope_theta"))
    factor = rope.pop("partial_rotary_factor", params.get("partial_rotary_factor"))
    if factor is not None:
        _expect(_is_number(factor), "partial_rotary_factor", "a number", factor)
        rotary_dim = int(head_dim * factor)
    else:
        given = params.get("rotary_dim")
        # Half of a head: the 64 channels that are transformers' default, and the default of both hosts.
        rotary_dim = _integer(head_dim // 2 if given is None else given, "rotary_dim")
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        rope = {}
    theta = TextConfig.rope_theta if theta is None else theta
    return {"rope_theta": theta, "rotary_dim": rotary_dim, "rope_parameters": rope}


def _refuse_unknown_values(params: Mapping[str, Any], sparse: Mapping[str, Any], n_layers: int) -> None:
    for key, known in _ONLY_KNOWN_VALUE.items():
        value = params.get(key)
        _expect(value is None or value in known, key, repr(known[0]), value)
    score_type = sparse.get("sparse_score_type", "max")
    _expect(score_type == "max", "sparse_score_type", "'max'", score_type)
    index_values = sparse.get("sparse_disable_index_value")
    freq = sparse.get("sparse_attention_freq")
    if isinstance(index_values, list) and isinstance(freq, list):
        lacking = any(f and not disabled for f, disabled in zip(freq[:n_layers], index_values, strict=False))
        _check(
            not lacking, "sparse_disable_index_value is 0 on a sparse layer; index values are not supported"
        )


def _mapping(params: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = params.get(key)
    _expect(value is None or isinstance(value, Mapping), key, "an object", value)
    return value or {}


def _integer(value: Any, key: str, at_least: int = 1) -> int:
    _expect(isinstance(value, int) and not isinstance(value, bool), key, "an integer", value)
    _expect(value >= at_least, key, f"at least {at_least}", value)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _expect(holds: bool, key: str, what: str, value: Any) -> None:
    _check(holds, f"{key} must be {what}, not {value!r}")


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(f"config: {message}")
