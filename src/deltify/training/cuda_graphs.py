"""CUDA graphs of a micro-batch's forward and backward pass, for models so small that Python limits their speed.

Without graphs, one KDA layer costs the host 8 ms per micro-batch, including the teacher and the backward pass. A replay
costs next to nothing.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from ..data.batches import Batch
from ..model.documents import document_starts

ROUND = 16  # documents: one graph serves all batches whose number of documents rounds up to the same multiple


class Compute(Protocol):
    """A step: add the gradients of a batch and return its losses."""

    def __call__(self, batch: Batch, max_documents: int | None) -> dict[str, Tensor]: ...


class GraphedStep:
    """Replay `compute` as a CUDA graph.

    The first batch of a shape runs without a graph, which initialises all libraries. The second one is captured.
    Gradients accumulate in fixed tensors, so clear them with `zero_grad(set_to_none=False)`. If the first batch of
    another shape may not fit into memory, the graphs are released and no step is captured from then on.

    Args:
        compute: Function that adds the gradients of `parameters` for a batch and returns its losses. It must pack the
            batch as `max_documents` documents (see `find_packing`), which gives the tensors a fixed shape. It must
            enter autocast itself, because autocast's cache of weights must not outlive a capture.
        parameters: Parameters that get gradients.
        log: Function that is called once with a message if a step cannot be captured. No step is captured from then on.
    """

    def __init__(self, compute: Compute, parameters: Iterable[nn.Parameter], log: Callable[[str], None]):
        self.compute, self.log, self.works = compute, log, True
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Batch, dict[str, Tensor]] | None] = {}
        self.pool, self.pool_bytes = torch.cuda.graph_pool_handle(), 0
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """Return the losses of a batch on the CPU, after adding its gradients."""
        max_documents = -(-int(document_starts(batch.position_ids).sum()) // ROUND) * ROUND
        key = (batch.input_ids.shape, max_documents, batch.loss_mask is None)
        if self.works and key not in self.graphs and not self.has_room(device):
            self.give_up("the GPU's memory does not hold a graph and a batch with another number of documents")
        if not self.works or key not in self.graphs:
            self.graphs[key] = None
            return self.compute(batch.to(device), max_documents)
        captured = self.graphs[key]
        if captured is None:
            try:
                captured = self.graphs[key] = self.capture(batch.to(device), max_documents)
            except RuntimeError as error:
                self.give_up(str(error).splitlines()[0])
                return self.compute(batch.to(device), max_documents)
        graph, static, losses = captured
        for fixed, new in zip(static.tensors, batch.tensors):
            fixed.copy_(new)
        graph.replay()
        return {name: loss.clone() for name, loss in losses.items()}

    def capture(self, static: Batch, max_documents: int) -> tuple[torch.cuda.CUDAGraph, Batch, dict[str, Tensor]]:
        """Capture a step on a batch whose tensors later batches are copied to."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(static.input_ids.device)
        # thread_local lets other threads, such as NCCL's, make CUDA calls during the capture
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            losses = self.compute(static, max_documents)
        self.pool_bytes += torch.cuda.memory_reserved(static.input_ids.device) - before
        return graph, static, losses

    def has_room(self, device: torch.device) -> bool:
        """Return whether a batch without a graph fits beside the graphs, whose memory it cannot use."""
        if not self.pool_bytes:
            return True
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0] >= 1.1 * self.pool_bytes  # a tenth more, for gaps between tensors

    def give_up(self, reason: str) -> None:
        """Release all graphs and capture no more."""
        self.works, self.pool_bytes = False, 0
        self.graphs.clear()
        torch.cuda.empty_cache()
        self.log(f"steps run without CUDA graphs: {reason}")
