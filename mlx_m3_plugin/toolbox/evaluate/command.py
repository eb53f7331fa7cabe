"""``mlx-m3 evaluate`` from its arguments to what it says."""

from pathlib import Path
from typing import Any

from ..checkpoint import open_checkpoint
from ..machine import default_memory
from ..progress import layers_bar
from ..text_files import read_text
from ..texts import built_in_text, read_texts
from .evaluation import evaluate
from .report import check_can_draw, draw, report_lines


def evaluate_command(
    checkpoint: str,
    reference: str | None = None,
    *,
    text_file: str | None = None,
    tokens: int | None = None,
    context: int = 4096,
    cache: str | None = None,
    memory: int | None = None,
    plot: str | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """What was found, as JSON and as lines.

    Raises:
        OSError, ValueError: see :func:`.evaluation.evaluate`.
    """
    if plot is not None and reference is None:
        raise ValueError("--plot compares layers; it needs --reference")
    if plot is not None:
        check_can_draw(Path(plot).expanduser())
    path = open_checkpoint(checkpoint).directory
    text = built_in_text() if text_file is None else _read(text_file)
    texts = read_texts(path, text, tokens, context)
    found = evaluate(
        checkpoint,
        texts,
        reference=reference,
        cache=None if cache is None else Path(cache).expanduser(),
        memory=(memory or default_memory()) // 2,
        watch=layers_bar,
    )
    if plot is not None:
        draw(found, Path(plot).expanduser())
    return found.as_dict(), report_lines(found)


def _read(file: str) -> str:
    return read_text(Path(file).expanduser())
