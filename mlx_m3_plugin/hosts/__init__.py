"""The libraries we are a guest of: one package each, the only files that import it."""
