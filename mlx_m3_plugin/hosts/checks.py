"""``load_model`` of either library, for M3 checkpoints.

Heavy modules are imported in the functions: whoever imports a library for another model does not
wait for them.
"""

from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from inspect import Parameter
from typing import Any

from .patching import Arguments, call, for_m3

_STRICT: ContextVar[bool] = ContextVar("strict", default=False)


def is_m3_checkpoint(directory: object) -> bool:
    """See :func:`mlx_m3_plugin.weights.files.is_m3`."""
    from ..weights.files import is_m3

    return is_m3(directory)


def with_checks(load_model: Callable[..., Any]) -> Callable[..., Any]:
    """A ``load_model(model_path, lazy=False, ...)`` that checks an M3 checkpoint's files before it
    loads them, and the values after.

    MLX opens shards that are cut off or absent, and lets the second of two tensors of one name win.
    """

    def checked(given: Arguments) -> Any:
        from ..weights.files import check_files

        if _STRICT.get():
            _set(given, "strict", True)
        options = {**given.kwargs, **given.arguments}
        # strict=False is an explicit opt-out.
        if options.get("strict", True):
            check_files(given.arguments["model_path"])
        loaded = call(load_model, given)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Reads scales, which a lazy load must leave alone.
        if not options.get("lazy") and hasattr(model, "check_values"):
            model.check_values()
        return loaded

    return for_m3(load_model, lambda given: is_m3_checkpoint(given.get("model_path")), checked)


def strictly(load: Callable[..., Any]) -> Callable[..., Any]:
    """A function that loads M3 checkpoints with no weight missing, whatever it asks for.

    What a checkpoint lacks would stay random.
    """

    @wraps(load)
    def strict(*args: Any, **kwargs: Any) -> Any:
        token = _STRICT.set(True)
        try:
            return load(*args, **kwargs)
        finally:
            _STRICT.reset(token)

    return strict


def _set(given: Arguments, name: str, value: Any) -> None:
    """Set an argument, which may be one of ``**kwargs``."""
    parameters = given.signature.parameters
    if name in parameters:
        given.arguments[name] = value
        return
    (others,) = (p.name for p in parameters.values() if p.kind is Parameter.VAR_KEYWORD)
    given.arguments[others] = {**given.arguments[others], name: value}
