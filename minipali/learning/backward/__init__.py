"""The gradient of every function of the model, file by file beside it: backward/gemma.py belongs to model/gemma.py.

Each function has the name and the arguments of its forward partner and returns `(y, pull)`. `y` is what the forward
gives, bit for bit. `pull(dy)` is the function's vector-Jacobian product, one link of the chain rule: it takes the
gradient of the loss with respect to y and returns the gradient with respect to the arrays that came in (the first
argument; all of them where there are several) and, where there are parameters, a tree of theirs with the same keys.
The shape line is that of y; `dy` has the shape of y, and `dx` that of x.

This is backpropagation without a tape and without a graph. Whatever pull needs, it remembers as a closure; a block's
pull calls the pulls of its parts in reverse order. What is used twice gets the sum of both gradients, the one rule
that is easy to forget.
"""
