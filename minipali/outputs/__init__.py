"""From an answer to shapes and pictures."""
