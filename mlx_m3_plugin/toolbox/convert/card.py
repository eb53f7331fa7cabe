"""The model card of a conversion."""

from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from ... import __version__
from ...weights.dtypes import name_of
from ..common import size_in_words
from ..parameters import component_of
from .plan import Plan

_PACKAGES = ("mlx", "mlx-lm", "mlx-vlm")

_CARD = """---
license: other
license_name: minimax-community
base_model: MiniMaxAI/MiniMax-M3
base_model_relation: quantized
library_name: mlx
pipeline_tag: {pipeline}
tags:
- mlx
- minimax_m3_vl
---

# MiniMax-M3, {recipe}

**Built with MiniMax M3.** {summary}.

| | |
|---|---|
| made from | {source} |
| recipe | `{recipe}` of mlx-m3-plugin {version} |
| size | {size}, {bits:.2f} bits per weight of {parameters:,} parameters |
| made with | {packages} |

| part | parameters | stored as |
|---|---:|---|
{rows}

## Use

```bash
pip install mlx-lm
mlx_lm.generate --model {name} --prompt "Hello" --max-tokens 4096 --temp 1.0 --top-p 0.95 --top-k 40
```

It opens in stock mlx-lm 0.32 and newer and in stock mlx-vlm {vlm} and newer. With
`pip install mlx-m3-plugin` both answer exactly as the reference does past 2,048 tokens, in batches too, and
their servers understand M3's reasoning and tool calls.

`sha256sum -c SHA256SUMS` or `mlx-m3 inspect --verify` checks that a download is whole.

How much this quantization loses is measured with `mlx-m3 evaluate`; this card does not claim anything.

## Licence

The MiniMax Community License of the weights that this was made from applies. Commercial use has conditions:
see the LICENSE of the source.

## Recipe

```toml
{text}
```
"""


def model_card(plan: Plan) -> str:
    packages = ", ".join(f"{name} {found}" for name in _PACKAGES if (found := _version(name)))
    return _CARD.format(
        pipeline="image-text-to-text" if plan.source.vision else "text-generation",
        recipe=plan.recipe.name,
        summary=plan.recipe.summary.rstrip("."),
        source=plan.source.title,
        version=__version__,
        size=size_in_words(plan.nbytes),
        bits=plan.bits_per_weight,
        parameters=plan.parameters,
        packages=packages,
        rows="\n".join(f"| {name} | {count:,} | {spec} |" for name, count, _, spec in components(plan)),
        name="path/to/this",
        # Until then it was not told apart whether the shared expert is packed.
        vlm="0.6.4" if plan.packed else "0.6.5",
        text=plan.recipe.text.strip(),
    )


class Component(NamedTuple):
    """A part of the model: how much of it there is, and the precisions in it, most first."""

    name: str
    parameters: int
    nbytes: int
    specs: str


def components(plan: Plan) -> list[Component]:
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    sizes: dict[str, int] = defaultdict(int)
    for module in plan.modules:
        spec = str(module.spec)
        if module.spec.bits is None:
            spec = name_of(next(iter(module.tensors.values())).dtype)
        for piece in module.pieces:
            # A packed shared expert lies among the routed ones.
            name = component_of(f"{piece.module}.weight") if piece.module in plan.specs else module.component
            size = piece.rows * piece.columns
            counts[name][spec] += size
            sizes[name] += module.nbytes * size // module.parameters
    return [
        Component(
            name, sum(specs.values()), sizes[name], ", ".join(sorted(specs, key=lambda spec: -specs[spec]))
        )
        for name, specs in counts.items()
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
