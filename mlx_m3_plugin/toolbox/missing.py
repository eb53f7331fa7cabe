"""What to install when something cannot be imported."""

import sys

FOR_MLX = (
    'pip install "mlx-m3-plugin[cpu]", or with an NVIDIA GPU [cuda12] or [cuda13] in place of [cpu]'
    if sys.platform == "linux"
    else "pip install --force-reinstall mlx"
)
_FOR = {
    "mlx": FOR_MLX,
    "mlx_vlm": 'pip install "mlx-m3-plugin[vlm]"',
    "matplotlib": 'pip install "mlx-m3-plugin[plot]"',
}


def what_to_install(error: ImportError) -> str | None:
    """One line for a user; None where the fault is in our own package."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "mlx_m3_plugin"):
        return None
    # The other packages that we import are mlx-lm and what comes with it.
    return f"{package} cannot be imported ({error}): {_FOR.get(package, 'pip install --upgrade mlx-lm')}"
