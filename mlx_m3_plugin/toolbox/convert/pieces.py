"""From a stored matrix to the one to be written, some rows at a time."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from ...weights.reading import TensorReader
from .plan import Module, Piece
from .recipe import How

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
    if module.how == piece.how and "global_scale" not in stored:
        return stored
    made = converted(stored, piece.how, module.how)
    mx.eval(made)
    return made


def converted(stored: dict[str, mx.array], source: How, how: How) -> dict[str, mx.array]:
    """Lazy rows of a matrix as ``how`` has them, from the parts that ``source`` describes."""
    values = dequantized(stored, source)
    if how.bits is None:
        return {"weight": values if how.dtype == "keep" else values.astype(getattr(mx, how.dtype))}
    made = mx.quantize(values, group_size=how.group_size, bits=how.bits, mode=how.mode)
    return dict(zip(("weight", "scales", "biases"), made, strict=False))


def dequantized(stored: dict[str, mx.array], source: How) -> mx.array:
    """The values of a stored matrix."""
    if source.bits is None:
        return stored["weight"]
    scaled: dict[str, Any] = {"global_scale": stored["global_scale"]} if "global_scale" in stored else {}
    values = mx.dequantize(
        stored["weight"],
        stored["scales"],
        stored.get("biases"),
        group_size=source.group_size,
        bits=source.bits,
        mode=source.mode,
        **scaled,
    )
    # Tensor scales are float32, and what they scale becomes it.
    return values if source.mode == "affine" else values.astype(mx.bfloat16)
