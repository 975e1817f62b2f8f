"""A model on disk to a tree of weights, and back."""
