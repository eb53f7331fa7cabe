"""Reasoning markers, chat template, tool calls.  Text in, structures out; imports no mlx."""
