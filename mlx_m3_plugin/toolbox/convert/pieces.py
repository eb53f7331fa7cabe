"""From a stored matrix to the one to be written, some rows at a time."""

from collections.abc import Iterator

import mlx.core as mx

from ..precision import converted
from ..shards import TensorReader
from .plan import Module, Piece

# Quantizing takes some copies in float32 of what it works on.
_BYTES_PER_ELEMENT = 24


def made_pieces(
    module: Module, reader: TensorReader, memory: int
) -> Iterator[tuple[int, dict[str, mx.array]]]:
    """All of a module's tensors, piece by piece: the first row, and the rows by part.

    Rows are counted over the pieces, and quantized each by itself, so it makes no difference where
    they are cut.

    Args:
        memory: bytes that the work on one piece may take.
    """
    begin = 0
    for piece in module.pieces:
        step = max(1, memory // (_BYTES_PER_ELEMENT * max(piece.columns, 1)))
        if step >= piece.rows:
            yield begin, _made(piece, module, reader, None)
        else:
            for start in range(0, piece.rows, step):
                rows = (start, min(start + step, piece.rows))
                yield begin + start, _made(piece, module, reader, rows)
        begin += piece.rows


def _made(
    piece: Piece, module: Module, reader: TensorReader, rows: tuple[int, int] | None
) -> dict[str, mx.array]:
    parts = {
        part: tensor if rows is None or part == "global_scale" else tensor.taken(*rows)
        for part, tensor in piece.parts.items()
    }
    stored = {part: reader.read(tensor) for part, tensor in parts.items()}
    if module.spec == piece.spec and "global_scale" not in stored:
        return stored
    made = converted(stored, piece.spec, module.spec)
    mx.eval(made)
    return made
