"""The libraries that we extend: one package each, the only files that import it."""
