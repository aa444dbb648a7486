"""From a pair of views to the loss: encoders, queue, optimiser, checkpoint; never imports ``pipeline``."""
