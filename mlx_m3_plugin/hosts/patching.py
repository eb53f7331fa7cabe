"""How our code gets around one of upstream's functions and leaves other models alone.

Two rules hold for every patch:

- It first looks for all that it needs of upstream (:func:`find`, :func:`check_uses`).  Where something
  is missing it changes nothing, and says what is missing.
- In a call it decides from the arguments alone whether this is MiniMax-M3, without reading anything
  that upstream does not read there.  For other models it calls upstream's function with the
  arguments as they came (:func:`for_m3`).
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from types import ModuleType
from typing import Any

Loader = Callable[[str], list[Any]]
Arguments = inspect.BoundArguments


class UpstreamChangedError(Exception):
    """Something that a patch needs is not there in the installed library, or takes other arguments."""


def find(module: ModuleType, name: str, *parameters: str) -> Any:
    """The attribute ``name`` of ``module``, such as ``"TokenizerWrapper.__init__"``.

    Args:
        parameters: names of parameters that it must take.

    Raises:
        UpstreamChangedError: it is not there, or does not take one of them.
    """
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
        if found is None:
            raise UpstreamChangedError(f"{module.__name__} has no {name}")
    check_takes(found, *parameters)
    return found


def check_takes(function: Any, *parameters: str) -> None:
    """Check that ``function`` has parameters with these names.

    Raises:
        UpstreamChangedError: names the first one that it has not.
    """
    taken = _signature(function).parameters
    for parameter in parameters:
        if parameter not in taken:
            raise UpstreamChangedError(f"{_full_name(function)} takes no {parameter}")


def check_uses(function: Any, *names: str) -> None:
    """Check that the code of ``function`` sets or reads attributes with these names.

    Raises:
        UpstreamChangedError: names the first one that it does not use.
    """
    code = getattr(inspect.unwrap(function), "__code__", None)
    used = code.co_names if code else ()
    for name in names:
        if name not in used:
            raise UpstreamChangedError(f"{_full_name(function)} uses no {name}")


def each(module: ModuleType, *patches: Callable[[ModuleType], str]) -> list[str]:
    """Apply the patches; one that does not fit does not keep the others from working.

    Returns:
        what each of them says that it does.

    Raises:
        UpstreamChangedError: what is missing, of all that do not fit, after the others were applied.
    """
    done, missing = [], []
    for patch in patches:
        try:
            done.append(patch(module))
        except UpstreamChangedError as error:
            missing.append(str(error))
    if missing:
        raise UpstreamChangedError("; ".join(missing))
    return done


def for_m3(
    original: Callable[..., Any],
    is_m3: Callable[[Mapping[str, Any]], bool],
    ours: Callable[[Arguments], Any],
) -> Callable[..., Any]:
    """``original`` for other models, ``ours`` for MiniMax-M3.

    Args:
        is_m3: decides by the arguments, by their names in ``original``.  Must not raise.
        ours: gets the arguments with their defaults; ``call(original, arguments)`` goes on with them.
    """
    signature = _signature(original)

    @wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:
            # The function itself says what is wrong with its arguments.
            return original(*args, **kwargs)
        given.apply_defaults()
        return ours(given) if is_m3(given.arguments) else original(*args, **kwargs)

    return patched


def call(function: Callable[..., Any], given: Arguments) -> Any:
    return function(*given.args, **given.kwargs)


def named(values: Iterable[Any], kind: type) -> Any:
    """The first of ``values`` that is of this type, whatever its position; None without one."""
    return next((value for value in values if isinstance(value, kind)), None)


def _full_name(function: Any) -> str:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '?')}.{name}"


def _signature(function: Any) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        # No function, or one without a signature: then nothing is known of its arguments.
        return inspect.Signature()
