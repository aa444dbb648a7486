"""From a picture file to a pair of query and key views; never imports ``model``."""
