"""Which shards mlx-lm loads: those with other names too, and for ``sharded_load`` those of a stage.

mlx-lm's own ``sharded_load`` is not strict, so weights that a checkpoint lacks stay random.  It loads
a model without weights before it fetches the files, which looks like an M3 without an indexer.  And it
finds a stage's files by the names of parameters, which only its own conversions have (until: mlx-lm 0.32).
"""

import json
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_m3_plugin.hosts.loading import CheckpointMixin, text_config_as_set
from mlx_m3_plugin.model.config import TextConfig
from mlx_m3_plugin.model.pipeline import split_layers
from mlx_m3_plugin.weights.headers import INDEX, weight_files
from mlx_m3_plugin.weights.names import is_vision, layer_of, published_name

# What mlx-lm fetches first.
_BESIDE_WEIGHTS = ["*.json", "*.py", "tokenizer.model", "*.tiktoken", "*.txt", "*.jsonl", "*.jinja"]


def is_ours(module: Any, config: dict[str, Any]) -> bool:
    """Whether ``mlx_lm.utils`` takes our class for this config; a native one may be preferred."""
    model_class, _ = module._get_classes(config)
    return issubclass(model_class, CheckpointMixin)


def load_shared(module: Any, options: Mapping[str, Any]) -> Any:
    """As ``mlx_lm.utils.sharded_load``.

    Args:
        module: ``mlx_lm.utils``.  options: the arguments of its function, by name.

    Raises:
        ValueError: a stage lacks weights, or heads or layers cannot be split like this.
    """
    pipeline_group, tensor_group = options["pipeline_group"], options["tensor_group"]
    if pipeline_group is None and tensor_group is None:
        tensor_group = mx.distributed.init()
    path = module._download(options["repo"], allow_patterns=_BESIDE_WEIGHTS)
    config = text_config_as_set(module.load_config(path))
    wanted = None
    if pipeline_group is not None:
        layers = range(*split_layers(config.num_hidden_layers, pipeline_group, config.pipeline_split))
        wanted = shards_with(path, config, layers)
    module._download(options["repo"], **({} if wanted is None else {"allow_patterns": wanted}))

    def classes(config: dict[str, Any]) -> tuple[Callable[[Any], Any], Any]:
        model_class, args_class = module._get_classes(config)

        def make(args: Any) -> Any:
            model = model_class(args)
            if pipeline_group is not None:
                model.pipeline(pipeline_group)
            return model

        return make, args_class

    with only_shards(path, wanted) as directory:
        model, config = module.load_model(directory, lazy=True, get_model_classes=classes)
    if tensor_group is not None:
        model.shard(tensor_group)
    tokenizer = module.load_tokenizer(
        path, options.get("tokenizer_config") or {}, eos_token_ids=config.get("eos_token_id")
    )
    mx.eval(model.parameters())
    model.check_values()
    # Wait for all processes: the first exchange of the model has a short timeout.
    mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))
    return (model, tokenizer, config) if options["return_config"] else (model, tokenizer)


def shards_with(directory: Path, config: TextConfig, layers: Container[int]) -> list[str] | None:
    """Names of the shards with tensors of these layers, or of the text model outside its layers;
    None without an index.
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


# --- directories of links, in which mlx-lm finds the shards that it should load ---


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

    mlx-lm opens ``model*.safetensors``; ModelOpt's checkpoints name theirs otherwise, and some are in
    folders.  The links
    are not needed once the files are open.
    """
    directory = Path(directory)
    shards = weight_files(directory)
    if all(file.parent == directory and file.name.startswith("model") for file in shards):
        yield directory
        return
    names = {file.name: file for file in directory.iterdir() if file not in shards}
    for file in shards:
        name = "-".join(file.relative_to(directory).parts)
        names[name if name.startswith("model") else f"model-{name}"] = file
    with _links(names) as links:
        yield links


@contextmanager
def _links(files: Mapping[str, Path]) -> Iterator[Path]:
    """A directory in which each file has its name here."""
    with tempfile.TemporaryDirectory(prefix="mlx-m3-") as links:
        for name, file in files.items():
            (Path(links) / name).symlink_to(file.resolve())
        yield Path(links)
