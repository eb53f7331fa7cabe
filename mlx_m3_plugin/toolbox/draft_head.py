"""A DSpark draft head on the disk, such as M3.1's: a folder with a config and shards of its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..weights import shorten
from ..weights.headers import DRAFT_HEAD, Headers, read_headers, weight_files
from .common import read_json_object

# The folder of MiniMax-M3.1-Flash's.
FOLDER = "dspark"
# What stands before its tensors' names.
PREFIX = "language_model.model.dspark."
_NUMBERS = (
    "hidden_size",
    "vocab_size",
    "num_hidden_layers",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "dspark_block_size",
)


@dataclass(frozen=True)
class DraftHead:
    """Its config and headers.

    Attributes:
        config: the part that describes the head.
    """

    directory: Path
    config: dict[str, Any]
    headers: Headers

    @property
    def block(self) -> int:
        """The most tokens that it drafts in a round."""
        return self.config["dspark_block_size"]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.headers.tensors.values())

    @property
    def bytes_per_drafted(self) -> int:
        """Read for each drafted token: the Markov head's second matrix.  Of the first, it looks up a row."""
        return self._bytes_of("markov_w2")

    @property
    def bytes_per_round(self) -> int:
        """Read once in a round: all weights but the Markov head's."""
        return self.nbytes - self._bytes_of("markov_head")

    def cache_bytes(self, context: int | None = None) -> int:
        """Of K and V in 16 bits, of all layers, for ``context`` tokens; a full window is the most."""
        window = self.config["sliding_window"]
        width = 2 * self.config["num_key_value_heads"] * self.config["head_dim"]
        return 2 * self.config["num_hidden_layers"] * width * min(context or window, window)

    def _bytes_of(self, part: str) -> int:
        return sum(tensor.nbytes for name, tensor in self.headers.tensors.items() if f"{part}." in name)


def open_draft_head(directory: Path) -> DraftHead:
    """Read config and headers.

    Raises:
        OSError: there is no such folder.
        ValueError: it holds no DSpark draft head, or a damaged one; says what is wrong.
    """
    whole = read_json_object(directory / "config.json")
    if DRAFT_HEAD not in (whole.get("architectures") or ()):
        raise ValueError(
            f"{directory} is not a draft head of MiniMax-M3.1: the architectures in its config.json are "
            f"{whole.get('architectures')}, not {DRAFT_HEAD}"
        )
    config = whole.get("text_config") or whole
    wrong = [name for name in _NUMBERS if not isinstance(config.get(name), int) or config[name] < 1]
    if wrong:
        raise ValueError(f"{directory / 'config.json'}: {wrong[0]} must be a positive integer")
    headers = read_headers(directory)
    problems = headers.problems if weight_files(directory) else ["there are no safetensors files"]
    if problems:
        raise ValueError("\n  ".join([f"{directory} is not a whole draft head:", *shorten(problems)]))
    return DraftHead(directory, config, headers)
