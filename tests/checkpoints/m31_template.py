"""A chat template as MiniMax-M3.1's, and checkpoints that have it."""

from pathlib import Path

M31_TEMPLATE = Path(__file__).with_name("m31_chat_template.jinja").read_text(encoding="utf-8")


def give_m31_template(checkpoint: Path) -> Path:
    """Replaces the chat template of a tiny checkpoint with :data:`M31_TEMPLATE`; returns the checkpoint."""
    (checkpoint / "chat_template.jinja").write_text(M31_TEMPLATE, encoding="utf-8")
    return checkpoint
