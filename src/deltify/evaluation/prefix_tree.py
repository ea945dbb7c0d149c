"""Token sequences as trees, in which shared prefixes occur once."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

MIN_SAVED_TOKENS = 64  # a shared prefix gets a node of its own if that saves at least so many tokens


@dataclass
class Node:
    """Tokens that follow those of the parent.

    Args:
        tokens: Token ids.
        context: Index of the context that ends here, if one does.
        children: Nodes that follow.
        targets: Triples (position, tokens, answer): `tokens` are predicted from `position` on, for this answer.
    """

    tokens: np.ndarray
    context: int | None = None
    children: list["Node"] = field(default_factory=list)
    targets: list[tuple[int, np.ndarray, int]] = field(default_factory=list)


def prefix_tree(contexts: list[np.ndarray]) -> list[Node]:
    """Return distinct, non-empty token sequences as trees, in which shared prefixes occur once.

    A prefix gets a node of its own if that saves at least `MIN_SAVED_TOKENS` tokens.
    """
    order = sorted(range(len(contexts)), key=lambda i: contexts[i].astype(">u4").tobytes())
    rows = [contexts[i] for i in order]  # in lexical order, so that sequences with a shared prefix are neighbours
    roots: list[Node] = []
    # rows[low:high] share `depth` tokens, of which their ancestors hold the first `above`
    todo = [(0, len(rows), 0, 0, roots)] if rows else []
    while todo:
        low, high, depth, above, siblings = todo.pop()
        if len(rows[low]) == depth:
            siblings.append(Node(rows[low][above:], order[low]))
            low += 1
        while low < high:
            end = low + 1
            while end < high and rows[end][depth] == rows[low][depth]:
                end += 1
            common = shared_tokens(rows[low], rows[end - 1])
            if end == low + 1:
                siblings.append(Node(rows[low][above:], order[low]))
            elif (common - above) * (end - low - 1) < MIN_SAVED_TOKENS:
                todo.append((low, end, common, above, siblings))
            else:
                node = Node(rows[low][above:common])
                siblings.append(node)
                if len(rows[low]) == common:
                    node.context = order[low]
                    low += 1
                todo.append((low, end, common, common, node.children))
            low = end
    return roots


def shared_tokens(a: np.ndarray, b: np.ndarray) -> int:
    """Return the length of the longest common prefix."""
    shorter = min(len(a), len(b))
    differing = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differing[0]) if len(differing) else shorter


def walk(roots: list[Node]) -> Iterator[Node]:
    """Yield all nodes of trees."""
    todo = list(roots)
    while todo:
        node = todo.pop()
        yield node
        todo.extend(node.children)
