"""``python -m mlx_m3_plugin``: the same as ``mlx-m3``, of this Python."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
