"""How the layers of a model follow each other."""

from __future__ import annotations

import dataclasses

import keras


@dataclasses.dataclass(frozen=True)
class Graph:
    """The calls of a functional or sequential model, inputs first.

    Attributes:
        operations: the layer or operation of each call.
        parents: for each call the indices of those whose outputs it reads.
        outputs: indices of the calls that make the model's outputs.
    """

    operations: list
    parents: list[list[int]]
    outputs: list[int]

    def after(self, starts, without=None) -> set[int]:
        """The calls downstream of some calls.

        Args:
            starts: indices of calls; not part of the result by themselves.
            without: index of a call that no way may go through.
        """
        found, starts = set(), set(starts)
        for i, parents in enumerate(self.parents):
            if i != without and any(p in found or p in starts for p in parents):
                found.add(i)
        return found - {without}

    def before(self, ends) -> set[int]:
        """The calls that lead to some calls."""
        found, ends = set(), set(ends)
        for i in reversed(range(len(self.parents))):
            if i in found or i in ends:
                found.update(self.parents[i])
        return found


def read_graph(model) -> Graph | None:
    """The graph of a model; `None` of a subclassed one, which has none.

    Private: `Function._nodes_by_depth`, `Operation._inbound_nodes`,
    `KerasTensor._keras_history`, and `Node` altogether.
    """
    if isinstance(model, keras.Sequential):
        count = len(model.layers)
        parents = [[i - 1] if i else [] for i in range(count)]
        return Graph(model.layers, parents, [count - 1] if count else [])
    by_depth = getattr(model, "_nodes_by_depth", None)
    if by_depth is None:
        return None
    nodes = [
        node
        for depth in sorted(by_depth, reverse=True)
        for node in by_depth[depth]
    ]
    place = {id(node): i for i, node in enumerate(nodes)}
    histories = [x._keras_history for x in keras.tree.flatten(model.outputs)]
    made_by = [h.operation._inbound_nodes[h.node_index] for h in histories]
    return Graph(
        [node.operation for node in nodes],
        [
            [place[id(p)] for p in node.parent_nodes if id(p) in place]
            for node in nodes
        ],
        [place[id(node)] for node in made_by],
    )
