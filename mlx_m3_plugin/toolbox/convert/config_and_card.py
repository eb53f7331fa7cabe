"""The files beside the weights: config, tokenizer, chat template, processors, licence and model card."""

import json
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from ... import __version__
from ...chat.prompt import CHAT_TEMPLATE, takes_effort
from ...startup.report import version_of
from ...weights.dtypes import name_of
from ...weights.quantization import with_quantization
from ..checkpoint import CHAT_TEMPLATE_FILES, M3, model_name
from ..checksums import SUMS
from ..common import read_json_object, read_text, size_in_words
from ..new_directory import LOCK, STATE
from ..parameters import component_of
from ..stock import stock_commands, why_these_options, wrong_past_the_budget
from .plan import ConversionPlan, quantization_of

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".npz")
# Written anew, or about the source's weights.
_NOT_COPIED = ("config.json", "README.md", "hf_quant_config.json", "offload_index.json", SUMS, LOCK, STATE)
_LARGEST = 200 << 20
# What mlx-lm's and mlx-vlm's classes read outside of ``text_config``.
_OUTER = "quantization quantization_config tie_word_embeddings eos_token_id transformers_version".split()
_PACKAGES = ("mlx", "mlx-lm", "mlx-vlm")


def write_config_and_card(directory: Path, plan: ConversionPlan) -> None:
    source = plan.source.directory
    for file in sorted(source.iterdir()):
        # Processors of images and videos: a model without a vision tower must not ask for them.
        is_for_vision = file.name.endswith("processor_config.json")
        if _is_copied(file) and (plan.source.vision or not is_for_vision):
            shutil.copyfile(file, directory / file.name)
    _write_json(directory / "config.json", new_config(plan))
    kept = _without_wrong_parser(directory / "tokenizer_config.json").get("chat_template")
    templates = [directory / name for name in CHAT_TEMPLATE_FILES if (directory / name).exists()]
    if not templates and not kept:
        (directory / CHAT_TEMPLATE_FILES[0]).write_text(CHAT_TEMPLATE, encoding="utf-8")
    template = read_text(templates[0]) if templates else kept
    (directory / "README.md").write_text(model_card(plan, takes_effort(template)), encoding="utf-8")


def _is_copied(file: Path) -> bool:
    return (
        file.is_file()
        and not file.name.startswith(".")
        and not file.name.endswith((*_WEIGHTS, ".index.json"))
        and file.name not in _NOT_COPIED
        and file.stat().st_size <= _LARGEST
    )


def _without_wrong_parser(file: Path) -> dict[str, Any]:
    """Older mlx-lm writes the tool parser ``json_tools`` into its conversions, which drops M3's calls."""
    content = read_json_object(file) if file.exists() else {}
    if content.pop("tool_parser_type", None) is not None:
        _write_json(file, content)
    return content


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- config ---


def new_config(plan: ConversionPlan) -> dict[str, Any]:
    """The source's ``config.json``, changed to describe the new weights."""
    config = with_quantization(plan.source.config, quantization_of(plan.modules))
    # mlx-vlm packs the shared expert unless this is false.
    packed = {"pack_shared_expert": plan.packed}
    if isinstance(nested := config.get("text_config"), dict):
        return {**config, "text_config": with_quantization(nested, None) | packed}
    # A flat config as that of ``minimax_m3_vl``, the only M3 that mlx-lm has.  With vision its own keys are
    # among the text's.
    text = {key: value for key, value in with_quantization(config, None).items() if key != "architectures"}
    kept = [*_OUTER, *(config if "vision_config" in config else ())]
    new = {"architectures": ["MiniMaxM3SparseForConditionalGeneration"], "model_type": "minimax_m3_vl"}
    new |= {key: config[key] for key in kept if key in config and key not in new}
    return {**new, "text_config": text | packed}


# --- card ---


def model_card(plan: ConversionPlan, has_effort: bool) -> str:
    """``has_effort``: whether the chat template takes one."""
    source, recipe, budget = plan.source, plan.recipe, plan.source.text_config.budget
    model, vision = model_name(source.text_config), bool(source.vision)
    is_m3 = model == M3
    commands = stock_commands(
        "path/to/this", mlx_lm=True, mlx_vlm=vision, model_name=model, takes_effort=has_effort
    )
    packages = ", ".join(f"{name} {found}" for name in _PACKAGES if (found := version_of(name)))
    parts = [f"| {name} | {count:,} | {spec} |" for name, count, _, spec in components(plan)]
    size = f"{size_in_words(plan.nbytes)}, {plan.bits_per_weight:.2f} bits per weight"
    license_name = "\nlicense_name: minimax-community" if is_m3 else ""
    lines = "\n".join
    return f"""---
license: other{license_name}
base_model: MiniMaxAI/{model}
base_model_relation: quantized
library_name: mlx
pipeline_tag: {"image-text-to-text" if vision else "text-generation"}
tags:
- mlx
- minimax_m3_vl
---

# {model}, {recipe.name}

**Built with {"MiniMax M3" if is_m3 else "MiniMax M3.1"}.** {recipe.summary.rstrip(".")}.

| | |
|---|---|
| made from | {source.title} |
| recipe | `{recipe.name}` of mlx-m3-plugin {__version__} |
| size | {size} of {plan.parameters:,} parameters |
| made with | {packages} |

| part | parameters | stored as |
|---|---:|---|
{lines(parts)}

## Use

```bash
pip install {"mlx-lm mlx-vlm" if vision else "mlx-lm"}
{lines(commands)}
```

{lines(why_these_options(has_effort))}

{_opens(plan)}
With `pip install mlx-m3-plugin` both answer exactly as the reference does past {budget:,} tokens, in batches
too, and their servers understand M3's reasoning and tool calls.

`sha256sum -c SHA256SUMS` or `mlx-m3 inspect --verify` checks that a download is whole.

`mlx-m3 evaluate` measures how much this quantization loses. This card makes no claim about it.

## Licence

The licence of the source's weights applies, MiniMax's own. Commercial use has conditions: see the LICENSE of
the source.

## Recipe

```toml
{recipe.text.strip()}
```
"""


def _opens(plan: ConversionPlan) -> str:
    """What stock libraries make of it."""
    # mlx-vlm 0.6.4 packs the shared expert always.
    vlm = "0.6.4" if plan.packed else "0.6.5"
    text = f"It opens in stock mlx-lm 0.32 and newer and in stock mlx-vlm {vlm} and newer."
    if any(spec.tensor_scales for spec in plan.specs.values()):
        text = "Stock mlx-lm 0.32 and newer open NVFP4's tensor scales on some GPUs; stock mlx-vlm does not."
    source = plan.source
    wrong = wrong_past_the_budget(source.text_config, bool(source.with_indexer))
    if wrong:
        reasons = " and ".join(f"{library} ({why})" for library, why in wrong.items())
        text += f"\nPast {source.text_config.budget:,} tokens they are not right alone: {reasons}."
    return text


def components(plan: ConversionPlan) -> list[tuple[str, int, int, str]]:
    """Parts of the new model: name, parameters, bytes and quantizations, the one of most parameters first."""
    stored: dict[str, Counter[str]] = defaultdict(Counter)
    sizes: Counter[str] = Counter()
    for module in plan.modules:
        spec = str(module.spec)
        if module.spec.bits is None:
            spec = name_of(next(iter(module.tensors.values())).dtype)
        for matrix in module.matrices:
            # Of the matrix: a packed shared expert is in a module of routed experts.
            name = component_of(f"{matrix.module}.weight" if matrix.module in plan.specs else matrix.module)
            stored[name][spec] += matrix.size
            sizes[name] += module.nbytes * matrix.size // module.parameters
    return [
        (name, specs.total(), sizes[name], ", ".join(spec for spec, _ in specs.most_common()))
        for name, specs in stored.items()
    ]
