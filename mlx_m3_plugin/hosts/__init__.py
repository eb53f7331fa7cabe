"""The libraries that run the model: one package for each, whose files alone import it."""
