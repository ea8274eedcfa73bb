"""The graph of autograd."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def leaves_of(result: Tensor) -> Iterator[Tensor]:
    """The tensors that ask for a gradient and that `result` is a function of, in no certain order."""
    nodes, seen = [result.grad_fn], set[object]()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        if (variable := getattr(node, "variable", None)) is not None:
            yield variable
