"""Ways to look inside: named activations, pictures of results."""
