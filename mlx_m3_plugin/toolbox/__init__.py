"""What the ``mlx-m3`` command can do: each a function first, a command second."""
