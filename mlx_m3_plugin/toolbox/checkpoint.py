"""A checkpoint: where it is, on disk or on the Hugging Face Hub, and what its headers and settings say.

No weight is read.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..model.config import TextConfig, text_config_of
from ..weights.byte_ranges import TensorReader
from ..weights.check import shorten
from ..weights.headers import (
    DRAFT_FOLDER,
    INDEX,
    MODEL_TYPES,
    TEXT_ONLY,
    Headers,
    StoredTensor,
    read_headers,
    stored_tensor,
    weight_map_of,
)
from ..weights.layouts import lacks_indexers, plan_layout
from ..weights.names import TEXT_PREFIX, is_draft, is_vision
from ..weights.tensor import Tensor
from .common import UnreadableText, parse_json_object, read_text
from .parameters import StoredModel, differences, quantized_modules, text_shapes, vision_shapes
from .precision import Quantization

# What MiniMax calls the models, which share a model_type.
M3, M31 = "MiniMax-M3", "MiniMax-M3.1-Flash"
# Folders of draft heads, which are checkpoints of their own: M3.1's, and that of draft tensors which a
# conversion has taken out of the shards.
DRAFT_TENSORS = "draft"
DRAFT_FOLDERS = (DRAFT_FOLDER, DRAFT_TENSORS)
CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_REPOSITORY = re.compile(r"^[\w-][\w.-]*/[\w.-]+$")
_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
# In ``https://huggingface.co/owner/name/tree/revision``.
_BEFORE_REVISION = ("tree", "blob", "resolve", "raw", "commit")
_SHARD_OF_SEVERAL = re.compile(r"-\d+-of-\d+\.safetensors$")
# Seconds to wait for the Hub's first answer.
_TIMEOUT = 20

# Where one of a checkpoint's small files is, None if there is no such file.
Find = Callable[[str], Path | None]


# --- where it is ---


@dataclass(frozen=True)
class Place:
    """Where a checkpoint is.

    Attributes:
        name: the directory as given, or ``owner/name``.
        directory: of its files; None for a repository that is not in the cache.
        repository: None for a directory.  revision: of the repository, None for the main one.
        missing: files that are missing from the repository's directory in the cache.
    """

    name: str
    directory: Path | None
    repository: str | None = None
    revision: str | None = None
    missing: tuple[str, ...] = ()

    @property
    def absent(self) -> str:
        """What of its files is not on disk, and the command that downloads it."""
        revision = "" if self.revision is None else f" --revision {self.revision}"
        command = f"`hf download {self.repository}{revision}`"
        if self.missing:
            missing = ", ".join(shorten(self.missing, 3))
            where = f"in the Hugging Face cache ({self.directory})"
            return f"{self.name} is incomplete {where}: {missing} missing; download the rest with {command}"
        here = "neither a directory nor in the Hugging Face cache"
        return f"{self.name} is {here}: download it with {command}"

    def on_disk(self) -> Path:
        """The directory, where no file is missing.

        Raises:
            OSError: one is; says how to download it.
        """
        if self.directory is None or self.missing:
            raise FileNotFoundError(self.absent)
        return self.directory


def locate(name: str | Path) -> Place:
    """Find a checkpoint by its directory, or by a repository's name or URL on the Hub.

    Uses no network.  A directory goes before a repository of the same name, as in mlx-lm.

    Raises:
        OSError: there is no such directory, and the name cannot be a repository.
    """
    name = str(name)
    directory = Path(name).expanduser()
    if directory.is_dir():
        return Place(name, directory)
    if directory.exists():
        raise NotADirectoryError(f"{name} is a file: name the directory that contains it")
    repository, revision = _path_on_the_hub(name)
    if not _REPOSITORY.match(repository):
        raise FileNotFoundError(
            f"{name} is neither a directory nor a repository id such as MiniMaxAI/MiniMax-M3"
        )
    cached = _cached(repository, revision)
    missing = () if cached is None else _missing_in(cached)
    return Place(repository, cached, repository, revision, missing)


def _path_on_the_hub(name: str) -> tuple[str, str | None]:
    """Name and revision of the repository that a name or a URL means."""
    from huggingface_hub import constants

    address = urlsplit(name if "://" in name else f"https://{name}")
    # HF_ENDPOINT names a mirror.
    if address.netloc not in (*_HUB_HOSTS, urlsplit(constants.ENDPOINT).netloc):
        return name, None
    parts = [unquote(part) for part in address.path.split("/") if part]
    if parts[:1] in (["datasets"], ["spaces"]):
        raise FileNotFoundError(f"{name} is not a model repository")
    revision = parts[3] if len(parts) > 3 and parts[2] in _BEFORE_REVISION else None
    return "/".join(parts[:2]), None if revision == constants.DEFAULT_REVISION else revision


def _cached(repository: str, revision: str | None) -> Path | None:
    """The snapshot in the cache, complete or not."""
    import huggingface_hub

    try:
        # Which files a checkpoint needs is for us to say: mlx-lm downloads only some of them as well.
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, local_files_only=True, allow_patterns="config.json"
            )
        )
    except huggingface_hub.errors.LocalEntryNotFoundError as error:
        # Newer versions distinguish a snapshot without such a file from no snapshot.
        found = getattr(error, "snapshot_path", None)
        return None if found is None else Path(found)


def _missing_in(snapshot: Path) -> tuple[str, ...]:
    """Files that an interrupted download has not fetched."""
    needed, weights = ["config.json"], list(snapshot.glob("*.safetensors"))
    # Not interrupted, but damaged: whoever reads the index reports that.
    with suppress(ValueError):
        needed += sorted(set(weight_map_of(snapshot).values()))
    if not (snapshot / INDEX).exists():
        if not weights:
            needed.append("*.safetensors")
        elif any(_SHARD_OF_SEVERAL.search(file.name) for file in weights):
            needed.append(INDEX)
    return tuple(file for file in needed if not (snapshot / file).exists())


# --- its headers and settings ---


@dataclass
class Source:
    """A checkpoint as its headers and settings describe it.

    Attributes:
        name: the path as given, or ``owner/name``.
        title: the same without the path of a directory.
        folder: the directory, with all files; None for a repository that is not whole in the cache.
        model: what ``--model`` of the stock commands takes; None for a revision that is not on disk.
        config: ``config.json``.
        tokenizer_config: ``tokenizer_config.json``, None if there is none.
        chat_template: its text, from any of the files that may contain it.
        draft_folders: those in which a draft head lies, beside the model.
        problems: settings that cannot be read, one line each.
    """

    name: str
    title: str
    folder: Path | None
    model: str | None
    headers: Headers
    config: dict[str, Any]
    tokenizer_config: dict[str, Any] | None
    chat_template: str | None
    draft_folders: list[str]
    problems: list[str]


def open_source(path_or_repository: str | Path) -> Source:
    """Read headers and settings.

    Raises:
        OSError: neither a directory nor a repository that can be read.
        ValueError: not a MiniMax-M3 checkpoint.
    """
    place = locate(path_or_repository)
    directory = place.directory
    if directory is None or place.missing:
        return _from_hub(place)

    def find(name: str) -> Path | None:
        return directory / name if (directory / name).exists() else None

    return _read_source(place, directory, find, lambda: read_headers(directory))


def _from_hub(place: Place) -> Source:
    import huggingface_hub

    try:
        # First, because it fails at once; a download retries for half a minute.
        info = huggingface_hub.model_info(place.name, revision=place.revision, timeout=_TIMEOUT)
        files = {file.rfilename for file in info.siblings or ()}

        def find(name: str) -> Path | None:
            if name not in files:
                return None
            return Path(huggingface_hub.hf_hub_download(place.name, name, revision=info.sha))

        def headers() -> Headers:
            return _hub_headers(huggingface_hub.get_safetensors_metadata(place.name, revision=info.sha))

        return _read_source(place, None, find, headers)
    except UnreadableText:
        raise
    # The Hub's client, its HTTP library and proxies each have exceptions of their own.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        failed = "reading it from the Hugging Face Hub failed"
        raise OSError(f"{place.absent}; {failed}: {reason}") from error


def _hub_headers(metadata: Any) -> Headers:
    headers, listed = Headers(), dict(metadata.weight_map)
    for file, content in sorted(metadata.files_metadata.items()):
        tensors = {}
        for name, entry in content.tensors.items():
            listed.pop(name, None)
            try:
                tensors[name] = stored_tensor(name, vars(entry), file)
            except ValueError as error:
                headers.problems.append(f"{file}: {error}")
        headers.add(file, tensors)
    headers.problems += [f"{name} is listed in the index but not in {file}" for name, file in listed.items()]
    return headers


def _read_source(
    place: Place, folder: Path | None, find: Find, read_headers: Callable[[], Headers]
) -> Source:
    # The config first: if it is another model's, there is nothing more to say.
    config = _read_config(place.name, find("config.json"))
    headers, problems = read_headers(), []
    tokenizer_config = chat_template = None
    try:
        if (file := find("tokenizer_config.json")) is not None:
            tokenizer_config = parse_json_object(read_text(file), "tokenizer_config.json")
    except UnreadableText as error:
        problems.append(str(error))
        tokenizer_config = {}
    try:
        kept = (tokenizer_config or {}).get("chat_template")
        if kept is not None and not isinstance(kept, str):
            # Several named templates are a list.
            kept = json.dumps(kept, ensure_ascii=False)
        files = map(find, CHAT_TEMPLATE_FILES)
        chat_template = next((read_text(file) for file in files if file is not None), kept)
    except UnreadableText as error:
        problems.append(str(error))
    return Source(
        name=place.name,
        title=place.name if place.repository or folder is None else folder.name,
        folder=folder,
        model=place.name if place.revision is None else str(folder) if folder else None,
        headers=headers,
        config=config,
        tokenizer_config=tokenizer_config,
        chat_template=chat_template,
        draft_folders=[name for name in DRAFT_FOLDERS if find(f"{name}/config.json") is not None],
        problems=problems,
    )


def _read_config(name: str, file: Path | None) -> dict[str, Any]:
    if file is None:
        raise FileNotFoundError(f"{name} has no config.json")
    config = parse_json_object(read_text(file), f"{name}: config.json")
    if config.get("model_type") not in MODEL_TYPES:
        raise UnreadableText(
            f"{name} is not a MiniMax-M3 checkpoint: its config.json has model_type "
            f"{config.get('model_type')!r}"
        )
    return config


def draft_in_words(folders: Iterable[str], names: Iterable[str]) -> str | None:
    """Where a checkpoint with these folders and stored names has a draft head; None if it has none."""
    tensors = sum(map(is_draft, names))
    places = [f"{folder}/" for folder in folders] + ([f"{tensors} tensors in the shards"] if tensors else [])
    return " and ".join(places) or None


# --- what of the model it holds ---


@dataclass(kw_only=True)
class Checkpoint(Source, StoredModel):
    """What a checkpoint's tensors are.

    Attributes:
        text_config: the text model's part of ``config.json``.
        plan, quantized: of the text model and of vision, by published names without a prefix.
        indexers: whether the checkpoint has weights for them.
        of_quantization: quantizations that MLX does not have, one line each.
        of_text, of_vision: what differs from the model, one line each.
    """

    text_config: TextConfig
    plan: Mapping[str, Tensor]
    quantized: Mapping[str, Quantization]
    indexers: bool
    of_quantization: list[str]
    of_text: list[str]
    of_vision: list[str]

    @property
    def with_indexer(self) -> list[int]:
        """The numbers of the layers that select blocks."""
        layers = range(self.text_config.num_hidden_layers)
        return [layer for layer in layers if self.indexers and self.text_config.is_sparse_attention(layer)]

    @property
    def directory(self) -> Path:
        assert self.folder is not None
        return self.folder

    @property
    def vision(self) -> list[str]:
        """The names of the vision tower's parameters, and the projectors'."""
        return [name for name in self.plan if is_vision(name)]

    @property
    def draft_tensors(self) -> dict[str, StoredTensor]:
        """Those of a draft head in the shards, by their stored names."""
        return {name: tensor for name, tensor in self.headers.tensors.items() if is_draft(name)}

    def reader(self) -> TensorReader:
        return TensorReader(self.directory, self.headers.tensors)


def model_name(config: TextConfig) -> str:
    """Which of MiniMax's models this is: M3.1 selects blocks on layers with dense MLPs too, and keeps an
    initial block; M3 does neither."""
    layers = range(config.num_hidden_layers)
    with_dense_mlp = [layer for layer in layers if not config.is_moe(layer)]
    on_all = bool(with_dense_mlp) and all(map(config.is_sparse_attention, layers))
    return M31 if on_all or config.index_init_blocks else M3


def read_text_config(config: dict[str, Any], name: str = "config.json") -> TextConfig:
    """As the checkpoint says, without environment variables; errors call it ``name``."""
    try:
        return text_config_of(config)
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix('config: ')}") from None


def read_checkpoint(source: Source, text_config: TextConfig) -> Checkpoint:
    """Compare what is stored with the model that ``config.json`` describes.

    Raises:
        ValueError: a tensor has a format that MLX has no mode for, or a size is out of range.
    """
    plan = plan_layout(source.headers.tensors, text_config, "", vision=True)
    indexers = not lacks_indexers(plan, text_config)
    text, vision = text_shapes(text_config, indexers=indexers), {}
    in_vision = {name: tensor for name, tensor in plan.items() if is_vision(name)}
    of_vision = []
    try:
        vision = vision_shapes(source.config) if in_vision else {}
    except ValueError as error:
        of_vision.append(str(error))
    quantized, of_quantization = quantized_modules(plan, text | vision)
    prefix = "" if source.config["model_type"] == TEXT_ONLY else TEXT_PREFIX
    in_text = {name: tensor for name, tensor in plan.items() if name not in in_vision}
    return Checkpoint(
        **vars(source),
        text_config=text_config,
        plan=plan,
        quantized=quantized,
        indexers=indexers,
        of_quantization=of_quantization,
        of_text=differences(in_text, text, quantized, prefix),
        of_vision=of_vision + differences(in_vision, vision, quantized),
    )


def open_checkpoint(path_or_repository: str | Path) -> Checkpoint:
    """Read headers and settings, and see that every weight of the model is there.

    Raises:
        OSError: there is no checkpoint in the directory, or the repository is not in the cache.
        ValueError: it is not a whole MiniMax-M3; says what is missing or wrong.
    """
    directory = locate(path_or_repository).on_disk()
    source = open_source(path_or_repository)
    text_config = read_text_config(source.config, str(directory / "config.json"))
    problems = source.headers.problems
    if not problems:
        found = read_checkpoint(source, text_config)
        problems = found.of_quantization or found.of_text + found.of_vision
    if problems:
        raise ValueError("\n  ".join([f"{directory} is not a whole MiniMax-M3:", *shorten(problems)]))
    return found
