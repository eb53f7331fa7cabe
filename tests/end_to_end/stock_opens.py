"""What a stock library makes of many checkpoints: run in an environment without the plugin.

    python stock_opens.py mlx_lm|mlx_vlm WORK

``WORK/asked.json`` holds ``{"tokens": [...], "directories": [...]}``.  Written are
``WORK/errors.json``, ``{directory: null or what the library said}``, and ``WORK/logits.npz``, the
logits in float32 by the directory's place in the list.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx


def logits(library: str, directory: str, tokens: mx.array) -> mx.array:
    if library == "mlx_lm":
        from mlx_lm.utils import load_model

        model: Any = load_model(Path(directory), strict=True)[0]
    else:
        from mlx_vlm.utils import load_model

        model = load_model(Path(directory), strict=True).language_model
    # Scales in bf16 make activations in bf16, whose rounding would hide a small mistake.
    model.set_dtype(mx.float32)
    found = model(tokens)
    return getattr(found, "logits", found)


def main(library: str, work: Path) -> None:
    assert importlib.util.find_spec("mlx_m3_plugin") is None
    asked = json.loads((work / "asked.json").read_text())
    tokens = mx.array([asked["tokens"]])
    errors: dict[str, str | None] = {}
    arrays = {}
    for place, directory in enumerate(asked["directories"]):
        try:
            arrays[str(place)] = logits(library, directory, tokens)
            mx.eval(arrays)
            errors[directory] = None
        except Exception as error:  # whatever the library says is the answer
            errors[directory] = f"{type(error).__name__}: {error}"[:500]
    mx.savez(str(work / "logits.npz"), **arrays)
    (work / "errors.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
