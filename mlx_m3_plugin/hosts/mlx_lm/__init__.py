"""mlx-lm's side: what it imports under its own names.  Importing this package imports nothing."""
