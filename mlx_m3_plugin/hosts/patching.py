"""How our code gets around one of upstream's functions and leaves other models alone.

Each function that we replace is one :class:`Patch`, and each library has one list of them.  Two rules
hold for every patch:

- It first looks for all that it needs of upstream.  Where something is missing it changes nothing,
  and says what is missing.
- In a call it decides from the arguments alone whether this is MiniMax-M3, without reading anything
  that upstream does not read there.  For other models it calls upstream's function with the
  arguments as they came (:func:`for_m3`).
"""

import inspect
import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import partial, wraps
from importlib.metadata import PackageNotFoundError, distribution, version
from types import ModuleType
from typing import Any, NamedTuple

Arguments = inspect.BoundArguments


class UpstreamChangedError(Exception):
    """The installed library lacks something that a patch needs, or has it in another form."""


class Patch(NamedTuple):
    """One function, method or class of upstream that we replace.

    Attributes:
        what: what M3 gets from it, in a few words for ``status()`` and ``mlx-m3 doctor``.
        replace: makes ours from upstream's module and upstream's function.
        until: when the patch can go: ``"never: "`` and the reason; the name of the test in
            ``tests/upstream`` that fails once upstream has no need of it; or ``"mlx-lm 0.32"``, the first
            release without what is replaced or needed.  A patch of the last kind is left out where the
            function is missing, and from that release on.
        others: what else ours uses of the module, in the form of ``target``.
        since: the first release that has all that is needed.  Older ones go without the patch.
        distribution: which one the module must be of, where others may have a module of its name.
        target: where upstream has it, and what ours uses of it: a module and a need, in the form that
            :func:`check_needs` takes, such as ``"mlx_lm.generate:TextStateMachine.flush(state)"``.
    """

    what: str
    replace: Callable[[Any, Any], Any]
    until: str
    others: tuple[str, ...] = ()
    since: str = ""
    distribution: str = ""
    target: str = ""

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def needs(self) -> tuple[str, ...]:
        return self.target.partition(":")[2], *self.others

    @property
    def path(self) -> str:
        """Of what is replaced, in its module."""
        return parse_need(self.needs[0])[0]

    def apply(self, module: ModuleType) -> bool:
        """Replace upstream's function in ``module``; False where this release has no need of it.

        Raises:
            UpstreamChangedError: something that is needed is missing; the module is as it was.
        """
        if self.distribution and not _is_of(self.distribution, module):
            return False
        try:
            check_needs(module, *self.needs)
        except UpstreamChangedError:
            if self._is_for_other_release(module):
                return False
            raise
        owner_path, _, leaf = self.path.rpartition(".")
        owner = find(module, owner_path) if owner_path else module
        original = vars(owner).get(leaf, getattr(owner, leaf))
        if isinstance(original, (staticmethod, classmethod)):
            setattr(owner, leaf, type(original)(self.replace(module, original.__func__)))
        else:
            setattr(owner, leaf, self.replace(module, original))
        return True

    def _is_for_other_release(self, module: ModuleType) -> bool:
        if not re.fullmatch(r"mlx-v?lm [\d.]+", self.until):
            return bool(self.since) and _installed_release(module) < _release(self.since)
        try:
            find(module, self.path)
        except UpstreamChangedError:
            return True
        return _installed_release(module) >= _release(self.until)


def by_target(patches: Mapping[str, Patch]) -> list[Patch]:
    """The patches, each with the :attr:`Patch.target` under which it is listed."""
    return [patch._replace(target=target) for target, patch in patches.items()]


def check_needs(module: ModuleType, *needs: str) -> None:
    """Check that ``module`` has everything that a patch uses.

    Args:
        needs: ``"function"``, ``"Class.method(parameter, parameter)"`` with names of parameters that it
            must take, and ``"Class.method(parameter): attribute, attribute"`` with names of attributes
            that its code must set or read.

    Raises:
        UpstreamChangedError: names the first thing that is missing.
    """
    for need in needs:
        path, parameters, attributes = parse_need(need)
        function, name = find(module, path), f"{module.__name__}.{path}"
        check_takes(name, function, *parameters)
        code = getattr(inspect.unwrap(function), "__code__", None)
        for attribute in attributes:
            if attribute not in (code.co_names if code else ()):
                raise UpstreamChangedError(f"{name} does not use {attribute}")


def parse_need(need: str) -> tuple[str, list[str], list[str]]:
    """The name, the parameters and the attributes in one of :attr:`Patch.needs`."""
    function, _, attributes = need.partition(": ")
    name, _, parameters = function.rstrip(")").partition("(")
    return name, parameters.split(", ") if parameters else [], attributes.split(", ") if attributes else []


def find(module: ModuleType, name: str) -> Any:
    """The attribute ``name`` of ``module``, such as ``"TokenizerWrapper.__init__"``.

    Raises:
        UpstreamChangedError: the module has no such attribute.
    """
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
        if found is None:
            raise UpstreamChangedError(f"{module.__name__} has no {name}")
    return found


def check_takes(name: str, function: Any, *parameters: str) -> None:
    """Check that ``function``, called ``name`` in errors, has parameters with these names.

    Raises:
        UpstreamChangedError: names the first one that it does not have.
    """
    taken = _signature(function).parameters if parameters else ()
    for parameter in parameters:
        if parameter not in taken:
            raise UpstreamChangedError(f"{name} has no parameter {parameter}")


def for_m3(
    original: Callable[..., Any], is_m3: Callable[[Mapping[str, Any]], bool], ours: Callable[[Arguments], Any]
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


def where(
    is_m3: Callable[[Mapping[str, Any]], bool],
) -> Callable[[Callable[[Any, Arguments], Any]], Callable[[Any, Any], Any]]:
    """Makes :attr:`Patch.replace` from a function of upstream's function and the arguments of a call.

    It is called where ``is_m3`` says so; see :func:`for_m3`.
    """

    def decorate(ours: Callable[[Any, Arguments], Any]) -> Callable[[Any, Any], Any]:
        return lambda module, original: for_m3(original, is_m3, partial(ours, original))

    return decorate


def where_ours(argument: str, attribute: str) -> Callable[[Callable[[Any, Arguments], Any]], Any]:
    """:func:`where` the class of an argument has an attribute that only classes of ours have."""
    return where(lambda given: hasattr(type(given[argument]), attribute))


def call(function: Callable[..., Any], given: Arguments) -> Any:
    return function(*given.args, **given.kwargs)


def _signature(function: Any) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        # Not a function, or one without a signature: then nothing is known of its arguments.
        return inspect.Signature()


def _release(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:3]))


def _installed_release(module: ModuleType) -> tuple[int, ...]:
    try:
        return _release(version(module.__name__.partition(".")[0].replace("_", "-")))
    except PackageNotFoundError:
        # A copy without metadata: take it for a new one, in which nothing may be missing.
        return (10**9,)


def _is_of(name: str, module: ModuleType) -> bool:
    try:
        path = distribution(name).locate_file(module.__name__.replace(".", "/"))
    except PackageNotFoundError:
        return False
    return str(module.__file__).startswith(str(path))


# --- load_model, which both libraries have ---

WHY_FILES_ARE_CHECKED = "never: MLX opens files that are cut off, and lets the second tensor of one name win"
# Whether M3 checkpoints are loaded strictly, also where the caller does not ask for that: what a checkpoint
# lacks would stay random.
LOADS_STRICTLY: ContextVar[bool] = ContextVar("loads_strictly", default=False)
# The directory that is being loaded, to be in memory afterwards; None in a lazy load.
LOADED_DIRECTORY: ContextVar[Any] = ContextVar("loaded_directory", default=None)


def is_m3_checkpoint(directory: object) -> bool:
    """See :func:`mlx_m3_plugin.weights.headers.is_m3`."""
    from ..weights.headers import is_m3

    return is_m3(directory)


def is_draft_head(directory: object) -> bool:
    """See :func:`mlx_m3_plugin.weights.headers.is_draft_head`."""
    from ..weights.headers import is_draft_head

    return is_draft_head(directory)


def with_checks(
    load_model: Callable[..., Any], is_ours: Callable[[object], bool] = is_m3_checkpoint
) -> Callable[..., Any]:
    """A ``load_model(model_path, lazy=False, ...)`` that checks an M3 checkpoint's files before it
    loads them, and the values after.  ``is_ours`` decides by the directory.

    MLX opens shards that are cut off or absent, and lets the second of two tensors of one name win.
    """

    def checked(given: Arguments) -> Any:
        from ..weights.headers import check_files

        if LOADS_STRICTLY.get():
            # mlx-vlm takes it in ``**kwargs``.
            named = given.arguments if "strict" in given.arguments else given.arguments["kwargs"]
            named["strict"] = True
        options = {**given.kwargs, **given.arguments}
        # strict=False is an explicit opt-out.
        if options.get("strict", True):
            check_files(given.arguments["model_path"])
        token = LOADED_DIRECTORY.set(None if options.get("lazy") else given.arguments["model_path"])
        try:
            loaded = call(load_model, given)
        finally:
            LOADED_DIRECTORY.reset(token)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Reads scales, which a lazy load must leave alone.
        if not options.get("lazy") and hasattr(model, "check_values"):
            model.check_values()
        return loaded

    return for_m3(load_model, lambda given: is_ours(given.get("model_path")), checked)


def calling_sets(variable: ContextVar[bool]) -> Callable[[Any, Any], Any]:
    """Makes :attr:`Patch.replace`: upstream's function, with ``variable`` set to True during its calls."""

    def replace_with(module: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            token = variable.set(True)
            try:
                return original(*args, **kwargs)
            finally:
                variable.reset(token)

        return replaced

    return replace_with


# --- dequantize_model, which both libraries have ---


@where_ours("model", "dequantize_scaled_layers")
def dequantize_model(dequantize: Any, given: Arguments) -> Any:
    """First the layers with tensor scales, which ``dequantize`` would leave out."""
    given.arguments["model"].dequantize_scaled_layers()
    return call(dequantize, given)
