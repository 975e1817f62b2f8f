"""What the training loop asks of a stage: batches by number, and the loss of each with its gradients."""
from typing import Any, Protocol


class Stage(Protocol):
    """A training task. It goes to other processes, so it is pickled: large things stand in it as the name of a file."""

    def batch(self, number: int) -> Any:
        """The batch of this number, a tree of host arrays; it follows from the number and the stage's seed alone."""

    def examples(self, batch: Any) -> int:
        """How many examples a batch holds, for the report."""

    def identity(self) -> dict:
        """What makes two runs the same run, as JSON holds it: an unfinished one goes on only if this is equal."""

    def loss_and_gradient(self, params: dict, batch: Any) -> tuple[Any, dict]:
        """The loss () of a batch, and its gradient with respect to every array of the tree `params`, as a tree."""
