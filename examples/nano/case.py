"""One exercise: what the model is given, and what it should say."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Case:
    """A conversation up to the model's turn.

    Attributes:
        task: which score it counts for.
        messages: in the form of chat templates, without the reply.
        reply: the right message of the assistant: ``content``, and ``reasoning_content`` or ``tool_calls``.
        tools: as in a request to a server.
        pictures: ``[height, width, 3]`` uint8 each; several frames of one video where ``is_video``.
    """

    task: str
    messages: list[dict[str, Any]]
    reply: dict[str, Any]
    tools: list[dict[str, Any]] | None = None
    pictures: Sequence[np.ndarray] = ()
    is_video: bool = False


def media(cases: Sequence[Case]) -> dict[str, Any]:
    """What a processor of transformers' form takes beside the text of ``cases``; all have one kind."""
    if cases[0].is_video:
        return {"videos": [np.stack(case.pictures) for case in cases]}
    pictures = [Image.fromarray(picture) for case in cases for picture in case.pictures]
    return {"images": pictures} if pictures else {}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def says(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}
