from tests.vlm.conftest import checkpoint, model

__all__ = ["checkpoint", "model"]
