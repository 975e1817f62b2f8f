"""How the model learns: gradients written by hand, an optimizer, pictures to learn from, and the training loop."""
