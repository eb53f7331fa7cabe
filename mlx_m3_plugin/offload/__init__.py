"""Routed experts that stay on the disk, and are read into a few slots of memory as they are needed."""
