"""A checkpoint's directory, as a loader finds it."""

import functools
import inspect
import json
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ..model.config import TextConfig
from .headers import INDEX, read_headers, weight_files
from .names import is_vision, layer_of, published_name

TEXT_ONLY = "minimax_m3"
MODEL_TYPES = ("minimax_m3_vl", TEXT_ONLY)
_PROBLEMS_TOLD = 10
_STRICT: ContextVar[bool] = ContextVar("strict", default=False)


def is_m3(directory: str | Path) -> bool:
    """Whether ``config.json`` in ``directory`` says so.  What cannot be read is not M3's."""
    return model_type_of(directory) in MODEL_TYPES


def model_type_of(directory: str | Path) -> Any:
    """The ``model_type`` of ``config.json`` in ``directory``; None where there is none to read."""
    try:
        config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
        return config.get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def check_files(directory: str | Path) -> None:
    """Look at every shard's header before anything is loaded.

    Raises:
        ValueError: shards are absent, cut off or damaged, or a tensor is in two of them.
    """
    if not weight_files(Path(directory)):
        # The loader has its own words for that.
        return
    problems = read_headers(directory).problems
    if problems:
        more = len(problems) - _PROBLEMS_TOLD
        told = problems[:_PROBLEMS_TOLD] + ([f"... and {more} more"] if more > 0 else [])
        raise ValueError("\n  ".join([f"{directory} is not a whole checkpoint (mlx-m3-plugin):", *told]))


def with_checks(load_model: Callable[..., Any]) -> Callable[..., Any]:
    """A host's ``load_model(path, lazy=False, ...)`` that looks at an M3 checkpoint's files before,
    and at its values after.

    MLX opens shards that are cut off or absent, and lets the second of two tensors of one name
    win.  Other checkpoints go straight through.
    """

    @functools.wraps(load_model)
    def checked(model_path: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_m3(model_path):
            return load_model(model_path, *args, **kwargs)
        if _STRICT.get():
            kwargs["strict"] = True
        asked = inspect.signature(load_model).bind(model_path, *args, **kwargs)
        asked.apply_defaults()
        options = {**asked.kwargs, **asked.arguments}
        # Who does not want it strict has said so.
        if options.get("strict", True):
            check_files(model_path)
        loaded = load_model(model_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Reads scales, which a lazy load is to leave alone.
        if not options.get("lazy") and hasattr(model, "check_values"):
            model.check_values()
        return loaded

    return checked


def shards_with(directory: Path, config: TextConfig, layers: Container[int]) -> list[str] | None:
    """Names of the shards that hold any of these layers, or what the text model has besides layers;
    None where no index tells.
    """
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    wanted = set()
    for stored, file in index["weight_map"].items():
        name = published_name(stored, config)
        layer = layer_of(name)
        if not is_vision(name) and (layer is None or layer in layers):
            wanted.add(file)
    return sorted(wanted)


def strictly(load: Callable[..., Any]) -> Callable[..., Any]:
    """A host's function that loads M3 checkpoints with no weight missing, whatever it asks for.

    What a checkpoint lacks would stay random.
    """

    @functools.wraps(load)
    def strict(*args: Any, **kwargs: Any) -> Any:
        token = _STRICT.set(True)
        try:
            return load(*args, **kwargs)
        finally:
            _STRICT.reset(token)

    return strict


@contextmanager
def only_shards(directory: Path, wanted: Sequence[str] | None) -> Iterator[Path]:
    """A directory of links in which these shards are a whole checkpoint; ``directory`` without ``wanted``."""
    if wanted is None:
        yield directory
        return
    index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file in wanted}
    shards = {file.name for file in weight_files(directory)}
    kept = (f for f in directory.iterdir() if f.name != INDEX and (f.name in wanted or f.name not in shards))
    with _links({file.name: file for file in kept}) as links:
        (links / INDEX).write_text(json.dumps(index), encoding="utf-8")
        yield links


@contextmanager
def with_shards_named_as_expected(directory: str | Path) -> Iterator[Path]:
    """``directory``, or one of links to it whose shards have names that mlx-lm looks for.

    mlx-lm opens ``model*.safetensors``; ModelOpt's checkpoints name theirs otherwise.  The links
    may go once the files are open.
    """
    directory = Path(directory)
    shards = weight_files(directory)
    if all(file.name.startswith("model") for file in shards):
        yield directory
        return
    names = {}
    for file in directory.iterdir():
        prefix = "model-" if file in shards and not file.name.startswith("model") else ""
        names[prefix + file.name] = file
    with _links(names) as links:
        yield links


@contextmanager
def _links(files: Mapping[str, Path]) -> Iterator[Path]:
    """A directory in which each file has its name here."""
    with tempfile.TemporaryDirectory(prefix="mlx-m3-") as links:
        for name, file in files.items():
            (Path(links) / name).symlink_to(file.resolve())
        yield Path(links)
