"""The libraries that run the model: a package for each, whose files alone import it."""
