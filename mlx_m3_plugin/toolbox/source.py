"""Where a checkpoint is, and what its headers and settings say: on disk, or on the Hugging Face Hub.

No weight is read.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..weights import Headers, StoredTensor, read_headers, shorten
from ..weights.headers import INDEX, MODEL_TYPES
from .common import UnreadableText, parse_json_object, read_text

CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_REPOSITORY = re.compile(r"^[\w-][\w.-]*/[\w.-]+$")
_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
# In ``https://huggingface.co/owner/name/tree/revision``.
_BEFORE_REVISION = ("tree", "blob", "resolve", "raw", "commit")
_SHARD_OF_SEVERAL = re.compile(r"-\d+-of-\d+\.safetensors$")
# Seconds to wait for the Hub's first answer.
_TIMEOUT = 20

# Returns the text of one of a checkpoint's small files, None if there is no such file.
ReadText = Callable[[str], str | None]


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
    def download(self) -> str:
        """The command that downloads the repository into the cache."""
        revision = "" if self.revision is None else f" --revision {self.revision}"
        return f"hf download {self.repository}{revision}"


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
    repository, revision = _repository_of(name)
    cached = _cached(repository, revision)
    missing = () if cached is None else _missing_in(cached)
    return Place(repository, cached, repository, revision, missing)


def locate_weights(name: str | Path) -> Place:
    """:func:`locate` for a checkpoint whose weights are to be read: all its files are on disk.

    Raises:
        OSError: they are not; says how to download them.
    """
    place = locate(name)
    if place.directory is None:
        raise FileNotFoundError(
            f"{place.name} is neither a directory nor in the Hugging Face cache: download it with "
            f"`{place.download}`"
        )
    if place.missing:
        raise FileNotFoundError(_incomplete(place))
    return place


def _incomplete(place: Place) -> str:
    named = ", ".join(shorten(place.missing, 3))
    return (
        f"{place.name} is incomplete in the Hugging Face cache ({place.directory}): {named} missing; "
        f"download the rest with `{place.download}`"
    )


def _repository_of(name: str) -> tuple[str, str | None]:
    """Name and revision of the repository that a name or a URL means."""
    path, revision = _path_on_the_hub(name)
    if not _REPOSITORY.match(path):
        raise FileNotFoundError(
            f"{name} is neither a directory nor a repository id such as MiniMaxAI/MiniMax-M3"
        )
    return path, revision


def _path_on_the_hub(name: str) -> tuple[str, str | None]:
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
    needed = ["config.json"]
    weights = list(snapshot.glob("*.safetensors"))
    try:
        needed += sorted(
            set(json.loads((snapshot / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        )
    except FileNotFoundError:
        if not weights:
            needed.append("*.safetensors")
        elif any(_SHARD_OF_SEVERAL.search(file.name) for file in weights):
            needed.append(INDEX)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        # Not interrupted, but damaged: whoever reads the index reports that.
        pass
    return tuple(file for file in needed if not (snapshot / file).exists())


# --- what it says ---


@dataclass
class Source:
    """A checkpoint as its headers and settings describe it.

    Attributes:
        name: the path as given, or ``owner/name``.
        model: what ``--model`` of the stock commands takes; None for a revision that is not on disk.
        config: ``config.json``.
        tokenizer_config: ``tokenizer_config.json``, None if there is none.
        chat_template: its text, from any of the files that may contain it.
        problems: settings that cannot be read, one line each.
    """

    name: str
    model: str | None
    headers: Headers
    config: dict[str, Any]
    tokenizer_config: dict[str, Any] | None = None
    chat_template: str | None = None
    problems: list[str] = field(default_factory=list)


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
    read_file: ReadText = lambda file: _read_file(directory / file)
    # The config first: if it is another model's, there is nothing more to say.
    config = _read_config(place.name, read_file)
    model = place.name if place.revision is None else str(directory)
    return _with_settings(Source(place.name, model, read_headers(directory), config), read_file)


def _from_hub(place: Place) -> Source:
    import huggingface_hub

    repository, model = place.name, place.name if place.revision is None else None
    try:
        # First, because it fails at once; a download retries for half a minute.
        info = huggingface_hub.model_info(repository, revision=place.revision, timeout=_TIMEOUT)
        files = {file.rfilename for file in info.siblings or ()}

        def read_file(file: str) -> str | None:
            if file not in files:
                return None
            return _read_file(Path(huggingface_hub.hf_hub_download(repository, file, revision=info.sha)))

        config = _read_config(repository, read_file)
        metadata = huggingface_hub.get_safetensors_metadata(repository, revision=info.sha)
        return _with_settings(Source(repository, model, _hub_headers(metadata), config), read_file)
    except (_NotM3, UnreadableText):
        raise
    # The Hub's client, its HTTP library and proxies each have exceptions of their own.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        here = (
            _incomplete(place)
            if place.missing
            else f"{repository} is neither a directory nor in the Hugging Face cache"
        )
        raise OSError(f"{here}; reading it from the Hugging Face Hub failed: {reason}") from error


def _hub_headers(metadata: Any) -> Headers:
    headers, listed = Headers(), dict(metadata.weight_map)
    for file, content in sorted(metadata.files_metadata.items()):
        tensors = {}
        for name, entry in content.tensors.items():
            listed.pop(name, None)
            start, end = entry.data_offsets
            tensor = StoredTensor(tuple(entry.shape), entry.dtype, end - start, file)
            if _mlx_reads(tensor):
                tensors[name] = tensor
            else:
                headers.problems.append(f"{file}: {name}: MLX does not read tensors of dtype {entry.dtype}")
        headers.add(file, tensors)
    headers.problems += [f"{name} is listed in the index but not in {file}" for name, file in listed.items()]
    return headers


def _mlx_reads(tensor: StoredTensor) -> bool:
    try:
        return bool(tensor.dtype)
    except KeyError:
        return False


class _NotM3(ValueError):
    """The config was read, and is another model's."""


def _read_config(name: str, read_file: ReadText) -> dict[str, Any]:
    text = read_file("config.json")
    if text is None:
        raise FileNotFoundError(f"{name} has no config.json")
    config = parse_json_object(text, f"{name}: config.json")
    if config.get("model_type") not in MODEL_TYPES:
        raise _NotM3(
            f"{name} is not a MiniMax-M3 checkpoint: its config.json has model_type "
            f"{config.get('model_type')!r}"
        )
    return config


def _with_settings(source: Source, read_file: ReadText) -> Source:
    try:
        text = read_file("tokenizer_config.json")
        source.tokenizer_config = None if text is None else parse_json_object(text, "tokenizer_config.json")
    except UnreadableText as error:
        source.problems.append(str(error))
        source.tokenizer_config = {}
    try:
        source.chat_template = _chat_template(source.tokenizer_config or {}, read_file)
    except UnreadableText as error:
        source.problems.append(str(error))
    return source


def _chat_template(tokenizer_config: dict[str, Any], read_file: ReadText) -> str | None:
    for file in CHAT_TEMPLATE_FILES:
        text = read_file(file)
        if text is not None:
            return text
    kept = tokenizer_config.get("chat_template")
    # Several named templates are a list.
    return kept if isinstance(kept, str) or kept is None else json.dumps(kept, ensure_ascii=False)


def _read_file(file: Path) -> str | None:
    try:
        return read_text(file)
    except FileNotFoundError:
        return None
