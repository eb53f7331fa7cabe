"""Which layouts a library opens, by trying each: ``python tests/checkpoints/opens.py mlx_lm|mlx_vlm``,
or some of them: ``... mlx_lm published_float mxfp8_official``.

Prints ``{layout: null or the error}`` as JSON.  With ``MLX_M3_PLUGIN=off`` it asks the library
alone.  Opening means a strict load and the right logits, compared within the block budget, so
that a library's own block selection is not what is judged here.  With ``--past-the-budget`` after the
library it prints ``{layout: [null or the error, whether logits are right past the budget]}``.
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_m3_plugin.model.config import text_config_of
from mlx_m3_plugin.model.decoder import LanguageModel
from mlx_m3_plugin.model.host import Host
from mlx_m3_plugin.weights.layouts import lacks_indexers

# Run as a script, also by Pythons that this checkout is not installed for.
sys.path.append(str(Path(__file__).parents[2]))
from tests.checkpoints.tiny_layouts import LAYOUTS, Layout

# Three times the block budget of these models, which is 32 tokens.
TOKENS = mx.array([[(7 * i * i + 3 * i) % 90 for i in range(100)]])
_WITHIN = 30
# On logits, against a float model that holds the values which the stored tensors stand for: float32 sums in
# another order.  Measured are at most 5e-6, with every kind of quantization.
TOLERANCE = 1e-4


def reference_logits(directory: Path, parameters: dict[str, mx.array], tokens: mx.array) -> mx.array:
    """Logits of a float model that holds the values which the stored tensors stand for."""
    config = text_config_of(json.loads((directory / "config.json").read_text()))
    model = LanguageModel(config, any_host())
    if lacks_indexers(parameters, config):
        for layer in model.model.layers:
            if layer.self_attn.is_sparse_attn:
                layer.self_attn.drop_indexer()
    model.load_weights(list(parameters.items()))
    return model(tokens)


def any_host() -> Host:
    try:
        from mlx_m3_plugin.hosts.mlx_lm.model import MLX_LM

        return MLX_LM
    except ImportError:
        # First the module that is served: it is what imports the others.
        import mlx_vlm.models.minimax_m3_vl  # noqa: F401

        from mlx_m3_plugin.hosts.mlx_vlm.language import MLX_VLM

        return MLX_VLM


def load_language_model(library: str, directory: Path) -> Any:
    if library == "mlx_lm":
        from mlx_lm.utils import load_model

        return load_model(directory)[0]
    from mlx_vlm.utils import load_model

    return load_model(directory).language_model


def logits_of(output: Any) -> mx.array:
    """mlx-vlm wraps them."""
    return getattr(output, "logits", output).astype(mx.float32)


def why_not(layout: Layout, library: str) -> tuple[str | None, bool]:
    """Why it does not open, and whether it is right past the budget."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        reference = reference_logits(path, layout.write(path), TOKENS)
        try:
            logits = logits_of(load_language_model(library, path)(TOKENS))
            distance = mx.abs(logits - reference).max(-1)[0]
            mx.eval(distance)
        except Exception as error:  # whatever the library says is the answer
            return f"{type(error).__name__}: {error}"[:300], False
    within = distance[:_WITHIN].max().item()
    if within > TOLERANCE:
        return f"logits differ by {within:.2g}", False
    return None, distance.max().item() <= TOLERANCE


def main(library: str, *names: str) -> None:
    past = names[:1] == ("--past-the-budget",)
    # What a library prints on the way is not the answer.
    with contextlib.redirect_stdout(sys.stderr):
        answers = {name: why_not(LAYOUTS[name], library) for name in names[past:] or LAYOUTS}
    print(json.dumps(answers if past else {name: why for name, (why, _) in answers.items()}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
