"""From a pair of views to the loss and the checkpoint; never imports ``pipeline``."""
