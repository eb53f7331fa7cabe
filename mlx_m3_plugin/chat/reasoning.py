"""The markers around M3's reasoning."""

# Each is one token of M3's vocabulary.  ``<think>`` is in the vocabulary too, but M3 does not use it.
THINKING_MARKERS = (("<mm:think>", "</mm:think>"),)
