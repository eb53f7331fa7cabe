"""What can be known of a checkpoint without its weights: headers and settings, from disk or from the Hub."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...weights import Headers, StoredTensor, read_headers
from ...weights.files import MODEL_TYPES
from ..checkpoint import CHAT_TEMPLATE_FILES
from ..locate import Place, incomplete, locate
from ..text_files import UnreadableText, parse_json_object, read_text

# Seconds to wait for the Hub's first answer.
_PATIENCE = 20

# The text of one of a checkpoint's small files, None when it has no such file.
ReadText = Callable[[str], str | None]


@dataclass
class Source:
    """A checkpoint as its headers and settings describe it.

    Attributes:
        name: the path as it was asked for, or ``owner/name``.
        model: what ``--model`` of the stock commands takes; None for a revision that is not here.
        config: ``config.json``.
        tokenizer_config: ``tokenizer_config.json``, None when there is none.
        chat_template: its text, wherever it is kept.
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
        OSError: it is neither a directory nor a repository that can be read.
        ValueError: it is no MiniMax-M3 checkpoint.
    """
    place = locate(path_or_repository)
    directory = place.directory
    if directory is None or place.missing:
        return _from_hub(place)
    read_file: ReadText = lambda file: _read_file(directory / file)
    # The config first: of another model there is nothing more to say.
    config = _read_config(place.name, read_file)
    model = place.name if place.revision is None else str(directory)
    return _with_settings(Source(place.name, model, read_headers(directory), config), read_file)


def _from_hub(place: Place) -> Source:
    import huggingface_hub

    repository, model = place.name, place.name if place.revision is None else None
    try:
        # First, for it says at once what is wrong; a download tries again for half a minute.
        info = huggingface_hub.model_info(repository, revision=place.revision, timeout=_PATIENCE)
        files = {file.rfilename for file in info.siblings or ()}

        def read_file(file: str) -> str | None:
            if file not in files:
                return None
            return _read_file(Path(huggingface_hub.hf_hub_download(repository, file, revision=info.sha)))

        config = _read_config(repository, read_file)
        metadata = huggingface_hub.get_safetensors_metadata(repository, revision=info.sha)
        return _with_settings(Source(repository, model, _hub_headers(metadata), config), read_file)
    except (_BadCheckpoint, UnreadableText):
        raise
    # The Hub's client, its HTTP library and proxies each have exceptions of their own.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        here = (
            incomplete(place) if place.missing else f"{repository} is not here, nor in the Hugging Face cache"
        )
        raise OSError(f"{here}; and the Hugging Face Hub does not give it: {reason}") from error


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
    headers.problems += [f"{name} is listed in the index and not in {file}" for name, file in listed.items()]
    return headers


def _mlx_reads(tensor: StoredTensor) -> bool:
    try:
        return bool(tensor.dtype)
    except KeyError:
        return False


class _BadCheckpoint(ValueError):
    """The settings were read, and are not those of a MiniMax-M3."""


def _read_config(name: str, read_file: ReadText) -> dict[str, Any]:
    text = read_file("config.json")
    if text is None:
        raise FileNotFoundError(f"{name} holds no config.json")
    config = parse_json_object(text, f"{name}: config.json")
    if config.get("model_type") not in MODEL_TYPES:
        raise _BadCheckpoint(
            f"{name} is no MiniMax-M3: its config.json has model_type {config.get('model_type')!r}"
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
    # Several templates by name are kept as a list.
    return kept if isinstance(kept, str) or kept is None else json.dumps(kept, ensure_ascii=False)


def _read_file(file: Path) -> str | None:
    try:
        return read_text(file)
    except FileNotFoundError:
        return None
