"""MiniMax-M3 for stock mlx-lm and mlx-vlm.

This file runs at every start of an interpreter that has the package installed
(through ``mlx_m3_plugin_startup.pth``, or ``.start`` from Python 3.15 on), so it
imports nothing but ``sys`` and must never raise.  Everything else waits until
``mlx_lm`` or ``mlx_vlm`` is imported.

Importing it by hand does the same: for a notebook kernel older than the
installation, a frozen application, or ``python -S``.
"""

import sys

__version__ = "0.1.0"
__all__ = ["__version__", "install", "status"]


class _Doorbell:
    """Waits on ``sys.meta_path`` for the first import of an upstream library, or of a host with patches.

    The class itself is the finder: no instance, and its state is in two attributes.
    """

    # The last is of mlx-openai-server, which imports mlx_lm in the midst of a module that has patches.
    _waiting_for: "tuple[str, ...]" = (
        "mlx_lm",
        "mlx_vlm",
        "vllm_mlx",
        "rapid_mlx",
        "vmlx_engine",
        "app.handler",
    )
    failure: "str | None" = None

    @classmethod
    def find_spec(cls, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name in cls._waiting_for:
            cls._waiting_for = ()
            _activate(cls)


def _activate(doorbell):  # type: ignore[no-untyped-def]
    try:
        from .startup.hook import activate

        activate(replacing=doorbell)
    except Exception as error:
        doorbell.failure = f"{type(error).__name__}: {error}"
        if _is_strict():
            raise
        sys.stderr.write(f"mlx-m3-plugin {__version__}: not active: {doorbell.failure}\n")


def _is_strict() -> bool:
    try:
        from .startup.settings import read_settings

        return read_settings().strict
    except Exception:  # whatever is broken in our package, the interpreter goes on
        return False


def install() -> None:
    """Make the plugin wait for ``mlx_lm`` and ``mlx_vlm``.  Calling it again does nothing."""
    if not _Doorbell._waiting_for or _Doorbell in sys.meta_path:
        return
    sys.meta_path.insert(0, _Doorbell)  # type: ignore[arg-type]
    if "mlx_lm" in sys.modules or "mlx_vlm" in sys.modules:
        _Doorbell.find_spec("mlx_lm")


def status():  # type: ignore[no-untyped-def]
    """What the plugin does in this process: print it, or read its attributes or ``as_dict()``.

    Imports neither mlx-lm nor mlx-vlm.
    """
    from .startup.status import status_of_process

    return status_of_process(__version__, _Doorbell.failure)


install()
