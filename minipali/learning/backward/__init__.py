"""The gradient of every function of the model, file by file beside it: backward/gemma.py belongs to model/gemma.py.

Each function has the name and the arguments of its forward partner and returns `(y, pull)`. `y` is what the forward
gives, bit for bit. `pull(dy)` takes the loss's gradient with respect to y and pulls it back: it returns the gradient
with respect to the first argument and, where there are parameters, a tree of their gradients with the same keys.

There is no tape and no graph. Whatever pull needs, it remembers as a closure; a block's pull calls the pulls of its
parts in reverse order. What is used twice gets the sum of both gradients, the one rule that is easy to forget.
"""
