"""The draft head of a checkpoint, which a conversion quantizes by its recipe, or keeps bit for bit.

It is written into folders, where stock mlx-lm and mlx-vlm look for no weights.
"""

import json
import shutil
from pathlib import Path

from ...model.config import TextConfig
from ...weights.headers import DRAFT_FOLDER
from ...weights.names import published_draft_name
from ..checkpoint import DRAFT_TENSORS, Checkpoint, draft_in_words
from ..draft_head import DraftHead, draft_shapes, open_draft_head
from ..precision import Quantization
from .plan import DraftPlan, NewModule, copied_module, new_module, source_matrices
from .recipe import Matrix, Recipe

_PIECE = 1 << 22
# Parts of names -> a recipe's name for what is like it in the model.
_PARTS = {"self_attn": "attention", "mlp": "dense_mlp", "markov_w1": "embeddings", "markov_w2": "lm_head"}


def plan_draft_head(source: Checkpoint, recipe: Recipe, *, keep: bool = False) -> DraftPlan | None:
    """What becomes of the draft head.  None where there is none that a recipe is for: it is left out.

    Args:
        keep: bit for bit.  So is the head where the recipe has a [plan]: sensitivity is not measured of it.

    Raises:
        ValueError: there is no draft head to keep, or the one to be quantized is not whole.
    """
    if keep:
        _check_kept(source)
    elif DRAFT_FOLDER not in source.draft_folders:
        return None
    if keep or recipe.bit_targets:
        return DraftPlan()
    head = open_draft_head(source.directory / DRAFT_FOLDER)
    checkpoint = _as_checkpoint(head)
    shapes = draft_shapes(head.config)
    return DraftPlan(checkpoint, tuple(_new_module(checkpoint, recipe, *item) for item in shapes.items()))


def _as_checkpoint(head: DraftHead) -> Checkpoint:
    return Checkpoint(
        text_config=TextConfig(),
        plan=head.plan,
        quantized=head.quantized,
        indexers=False,
        of_quantization=[],
        of_text=[],
        of_vision=[],
        name=str(head.directory),
        title=head.directory.name,
        folder=head.directory,
        model=None,
        config=head.whole_config,
        headers=head.headers,
    )


def _new_module(head: Checkpoint, recipe: Recipe, name: str, shape: tuple[int, ...]) -> NewModule:
    published = published_draft_name(name)
    if len(shape) == 1 or shape[0] == 1:
        # A norm, or the confidence head.
        return copied_module(head, name, published, Quantization())
    module = name.removesuffix(".weight")
    part = next((part for of_name, part in _PARTS.items() if of_name in name), "draft")
    matrix = Matrix(module, part, None, 0, *shape)
    spec = recipe.spec(matrix)
    # What is quantized already and to be kept keeps its quantization.
    spec = head.spec(module) if spec == Quantization() else spec
    return new_module(head, published.removesuffix(".weight"), spec, list(source_matrices(head, matrix)))


def _check_kept(source: Checkpoint) -> None:
    words = draft_in_words(source.draft_folders, source.headers.tensors)
    if words is None:
        raise ValueError(f"--keep-draft: {source.name} has no draft head")
    if source.draft_tensors and DRAFT_TENSORS in source.draft_folders:
        raise ValueError(
            f"--keep-draft: {source.name} has draft tensors in its shards, which would be written into "
            f"{DRAFT_TENSORS}/, and that folder is there already: rename it"
        )


def draft_bytes(source: Checkpoint) -> int:
    files = (f for folder in source.draft_folders for f in (source.directory / folder).rglob("*"))
    stored = sum(tensor.nbytes for tensor in source.draft_tensors.values())
    return stored + sum(file.stat().st_size for file in files if file.is_file())


def write_draft(source: Checkpoint, directory: Path) -> list[str]:
    """Folders are copied; draft tensors of the shards go into one of their own.  Returns all files' names."""
    for folder in source.draft_folders:
        shutil.copytree(source.directory / folder, directory / folder, dirs_exist_ok=True)
    folders = list(source.draft_folders)
    if source.draft_tensors:
        folders.append(DRAFT_TENSORS)
        (directory / DRAFT_TENSORS).mkdir(exist_ok=True)
        shutil.copyfile(source.directory / "config.json", directory / DRAFT_TENSORS / "config.json")
        _copy_tensors(source, directory / DRAFT_TENSORS / "model.safetensors")
    files = (file for folder in folders for file in (directory / folder).rglob("*") if file.is_file())
    return [file.relative_to(directory).as_posix() for file in files]


def _copy_tensors(source: Checkpoint, file: Path) -> None:
    """With their names, bytes and dtypes, also those that MLX reads as others."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in source.draft_tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": tensor.stored_dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as new:
        new.write(len(header).to_bytes(8, "little") + header)
        for tensor in source.draft_tensors.values():
            with (source.directory / tensor.file).open("rb") as shard:
                shard.seek(tensor.start)
                for done in range(0, tensor.nbytes, _PIECE):
                    new.write(shard.read(min(_PIECE, tensor.nbytes - done)))
