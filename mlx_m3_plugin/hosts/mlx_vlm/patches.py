"""Extensions of mlx-vlm modules that it does not look up by name."""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

from mlx_m3_plugin.chat.reasoning import THINK_END, THINK_START
from mlx_m3_plugin.chat.vocabulary import is_m3
from mlx_m3_plugin.hosts.mlx_vlm.prompts import knows_open_prompts, with_template, with_tokenizers
from mlx_m3_plugin.weights import with_quantization
from mlx_m3_plugin.weights.files import strictly, with_checks


def utils(module: Any, load_entry_points: Callable[[str], list[Any]]) -> list[str]:
    """Check the files of M3 checkpoints when they are loaded, and save models in mlx-vlm's own layout."""
    module.load_model = with_checks(module.load_model)
    module.sharded_load = strictly(module.sharded_load)
    module.load_processor = with_template(module.load_processor)
    if hasattr(module, "AutoProcessor"):
        module.AutoProcessor = with_tokenizers(module.AutoProcessor)
    if knows_open_prompts(module.ThinkingBudgetCriteria):
        _count_m3_thinking(module.ThinkingBudgetCriteria)
    save_weights, save_config = module.save_weights, module.save_config
    # What save_config has to say of the weights that save_weights has just written.
    described: list[dict[str, Any]] = []

    @wraps(save_weights)
    def save_weights_as_stored(save_path: Any, model: Any, **kwargs: Any) -> None:
        if hasattr(model, "as_stored"):
            model, description = model.as_stored()
            described[:] = [description]
        save_weights(save_path, model, **kwargs)

    @wraps(save_config)
    def save_described_config(config: dict[str, Any], config_path: Any) -> None:
        if described and config.get("model_type") in ("minimax_m3_vl", "minimax_m3"):
            config = describe(config, described.pop())
        save_config(config, config_path)

    module.save_weights, module.save_config = save_weights_as_stored, save_described_config
    return [
        "load_model checks the files of M3 checkpoints, sharded_load is strict about them",
        "save_weights writes mlx-vlm's own M3 layout",
        "thinking budgets",
    ]


def _count_m3_thinking(criteria: Any) -> None:
    """``--thinking-budget`` for M3, where nobody has named the markers.

    Those of other models are in M3's vocabulary as well, and never come.  mlx-vlm then takes the
    prompt for one that opens no reasoning; ``enable_thinking`` has M3's open it.
    """
    init = criteria.__init__

    @wraps(init)
    def __init__(self: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        given = signature(init).bind(self, tokenizer, *args, **kwargs)
        given.apply_defaults()
        if is_m3(tokenizer) and given.arguments["thinking_start_token"] in (None, "<think>"):
            opened = bool(given.arguments["enable_thinking"])
            given.arguments.update(
                thinking_start_token=THINK_START,
                thinking_end_token=THINK_END,
                prompt_preopens_thinking=opened,
                enable_thinking=True,
            )
        init(*given.args, **given.kwargs)

    criteria.__init__ = __init__


def describe(config: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    """``config`` with what is true of the weights beside it: quantization, and how experts lie."""
    config = with_quantization(config, description["quantization"])
    packed = {"pack_shared_expert": description["pack_shared_expert"]}
    if isinstance(config.get("text_config"), dict):
        return {**config, "text_config": config["text_config"] | packed}
    return config | packed
