"""Programs and functions that judge a checkpoint; may import ``pipeline`` and ``model``."""
