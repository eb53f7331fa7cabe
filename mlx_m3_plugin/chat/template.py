"""M3's chat template, for checkpoints that we write.  One that has its own keeps its own."""

from importlib.resources import files

CHAT_TEMPLATE = (files(__package__) / "chat_template.jinja").read_text(encoding="utf-8")
