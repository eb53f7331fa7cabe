"""Extensions of mlx-vlm modules that it does not look up by name."""

from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_m3_plugin.chat.reasoning import THINK_END, THINK_START
from mlx_m3_plugin.hosts.checks import strictly, with_checks
from mlx_m3_plugin.hosts.mlx_vlm.identity import is_m3
from mlx_m3_plugin.hosts.mlx_vlm.prompts import auto_processor, knows_open_prompts, load_processor
from mlx_m3_plugin.hosts.patching import Arguments, Loader, call, each, find, for_m3
from mlx_m3_plugin.weights import with_quantization
from mlx_m3_plugin.weights.files import MODEL_TYPES


def utils(module: ModuleType, load_entry_points: Loader) -> list[str]:
    """Check the files of M3 checkpoints when they are loaded, and save models in mlx-vlm's own layout."""
    return each(
        module, _load_model, _sharded_load, load_processor, auto_processor, _thinking_budgets, _saving
    )


def _load_model(module: Any) -> str:
    module.load_model = with_checks(find(module, "load_model", "model_path", "lazy"))
    return "load_model checks the files of M3 checkpoints"


def _sharded_load(module: Any) -> str:
    module.sharded_load = strictly(find(module, "sharded_load"))
    return "sharded_load is strict about M3 checkpoints"


def _thinking_budgets(module: Any) -> str:
    """``--thinking-budget`` for M3, where nobody has named the markers.

    Those of other models are in M3's vocabulary as well, and never come.  mlx-vlm then takes the
    prompt for one that opens no reasoning; ``enable_thinking`` has M3's open it.
    """
    criteria = find(module, "ThinkingBudgetCriteria")
    parameters = ("tokenizer", "thinking_start_token", "thinking_end_token", "enable_thinking")
    init = find(module, "ThinkingBudgetCriteria.__init__", *parameters)
    if not knows_open_prompts(criteria):
        return "no thinking budgets: this mlx-vlm does not know whether a prompt opens reasoning"

    def init_for_m3(given: Arguments) -> None:
        if given.arguments["thinking_start_token"] in (None, "<think>"):
            opened = bool(given.arguments["enable_thinking"])
            given.arguments.update(
                thinking_start_token=THINK_START,
                thinking_end_token=THINK_END,
                prompt_preopens_thinking=opened,
                enable_thinking=True,
            )
        call(init, given)

    criteria.__init__ = for_m3(init, lambda given: is_m3(given["tokenizer"]), init_for_m3)
    return "thinking budgets"


def _saving(module: Any) -> str:
    """Have ``save_weights`` write mlx-vlm's own layout, and ``save_config`` describe it."""
    save_weights = find(module, "save_weights", "save_path", "model")
    save_config = find(module, "save_config", "config", "config_path")
    # What save_config has to say of the weights that save_weights has written: by directory.
    described: dict[Path | None, dict[str, Any]] = {}

    def save_m3(given: Arguments) -> None:
        given.arguments["model"], description = given.arguments["model"].as_stored()
        call(save_weights, given)
        described[_real(given.arguments["save_path"])] = description

    def is_described(given: Any) -> bool:
        directory = _real(given["config_path"], parent=True) if described else None
        config = given["config"]
        return directory in described and isinstance(config, dict) and config.get("model_type") in MODEL_TYPES

    def save_described(given: Arguments) -> None:
        description = described.pop(_real(given.arguments["config_path"], parent=True))
        given.arguments["config"] = describe(given.arguments["config"], description)
        call(save_config, given)

    # Only our classes have the method.
    module.save_weights = for_m3(
        save_weights, lambda given: hasattr(type(given["model"]), "as_stored"), save_m3
    )
    module.save_config = for_m3(save_config, is_described, save_described)
    return "save_weights writes mlx-vlm's own M3 layout"


def _real(path: Any, parent: bool = False) -> Path | None:
    """The path, or the directory it is in, without links; None for what is no path."""
    if not isinstance(path, (str, PathLike)):
        return None
    real = Path(path).resolve()
    return real.parent if parent else real


def describe(config: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    """``config`` with what is true of the weights beside it: quantization, and how experts lie."""
    config = with_quantization(config, description["quantization"])
    packed = {"pack_shared_expert": description["pack_shared_expert"]}
    if isinstance(config.get("text_config"), dict):
        return {**config, "text_config": config["text_config"] | packed}
    return config | packed
