"""Where a checkpoint is: a directory, or a repository of the Hugging Face Hub, perhaps in its cache here."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..weights import shorten
from ..weights.headers import INDEX

_REPOSITORY = re.compile(r"^[\w-][\w.-]*/[\w.-]+$")
_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
# In ``https://huggingface.co/owner/name/tree/revision``.
_BEFORE_REVISION = ("tree", "blob", "resolve", "raw", "commit")
_SHARD_OF_SEVERAL = re.compile(r"-\d+-of-\d+\.safetensors$")


@dataclass(frozen=True)
class Place:
    """A checkpoint that was asked for.

    Attributes:
        name: the directory as it was given, or ``owner/name``.
        directory: where its files are; None for a repository that is not in the cache.
        repository: None for a directory.  revision: of it, None for the main one.
        missing: files that a repository's directory in the cache lacks.
    """

    name: str
    directory: Path | None
    repository: str | None = None
    revision: str | None = None
    missing: tuple[str, ...] = ()

    @property
    def download(self) -> str:
        """The command that brings the repository into the cache."""
        revision = "" if self.revision is None else f" --revision {self.revision}"
        return f"hf download {self.repository}{revision}"


def locate(name: str | Path) -> Place:
    """Find a checkpoint by its directory, or by a repository's name or address on the Hub.

    Asks no network.  A directory goes before a repository of the same name, as in mlx-lm.

    Raises:
        OSError: there is no such directory, and it cannot be a repository.
    """
    name = str(name)
    directory = Path(name).expanduser()
    if directory.is_dir():
        return Place(name, directory)
    if directory.exists():
        raise NotADirectoryError(f"{name} is a file; name the directory that it is in")
    repository, revision = _repository_of(name)
    cached = _cached(repository, revision)
    missing = () if cached is None else _missing_in(cached)
    return Place(repository, cached, repository, revision, missing)


def locate_weights(name: str | Path) -> Place:
    """The same of a checkpoint whose weights are to be read: all its files are here.

    Raises:
        OSError: they are not; says how to download them.
    """
    place = locate(name)
    if place.directory is None:
        raise FileNotFoundError(
            f"{place.name} is neither a directory nor in the Hugging Face cache; download it with "
            f"`{place.download}`"
        )
    if place.missing:
        raise FileNotFoundError(incomplete(place))
    return place


def incomplete(place: Place) -> str:
    """That, and what, the cache lacks."""
    named = ", ".join(shorten(place.missing, 3))
    return (
        f"{place.name} is in the Hugging Face cache in part only ({place.directory}): {named} missing; "
        f"download the rest with `{place.download}`"
    )


def _repository_of(name: str) -> tuple[str, str | None]:
    """Name and revision of the repository that a name or an address means."""
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
        raise FileNotFoundError(f"{name} is not a model's repository")
    revision = parts[3] if len(parts) > 3 and parts[2] in _BEFORE_REVISION else None
    return "/".join(parts[:2]), None if revision == constants.DEFAULT_REVISION else revision


def _cached(repository: str, revision: str | None) -> Path | None:
    """The snapshot in the cache, whole or in part."""
    import huggingface_hub

    try:
        # Which files a checkpoint needs is for us to say: mlx-lm, too, downloads some of them only.
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, local_files_only=True, allow_patterns="config.json"
            )
        )
    except huggingface_hub.errors.LocalEntryNotFoundError as error:
        # Newer versions tell a snapshot without such a file from none.
        found = getattr(error, "snapshot_path", None)
        return None if found is None else Path(found)


def _missing_in(snapshot: Path) -> tuple[str, ...]:
    """What a download that was cut off has not brought."""
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
        # Not cut off, but damaged; who reads it will say so.
        pass
    return tuple(file for file in needed if not (snapshot / file).exists())
