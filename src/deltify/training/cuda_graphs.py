"""A micro-batch's forward and backward as one CUDA graph: small models wait for the GPU, not for Python.

Eagerly a KDA layer costs the host 8 ms a micro-batch, teacher and backward included; a replay costs next to nothing.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..data.batches import Batch
from ..model.mixers import document_starts, fixed_documents

ROUND = 16  # documents: a graph serves all batches with up to as many


class GraphedStep:
    """`compute`, replayed. The first batch of a shape runs as it is, which makes all libraries ready; the second is
    captured. Gradients add up in tensors that stay where they are: clear them with `zero_grad(set_to_none=False)`.

    Args:
        compute: losses of a batch, after it has added the gradients of `parameters`. Enters autocast itself, whose
            cache of weights must not outlive a capture.
        say: told, once, if a step cannot be captured; all then run as they are.
    """

    def __init__(
        self, compute: Callable[[Batch], dict[str, Tensor]], parameters: Iterable[nn.Parameter], say: Callable
    ):
        self.compute, self.say, self.works = compute, say, True
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Batch, dict[str, Tensor]] | None] = {}
        self.pool = torch.cuda.graph_pool_handle()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """Losses of a batch that lies on the CPU."""
        documents = -(-int(document_starts(batch.position_ids).sum()) // ROUND) * ROUND
        key = (batch.input_ids.shape, documents)
        with fixed_documents(documents):
            if not self.works or key not in self.graphs:
                self.graphs[key] = None
                return self.compute(batch.to(device))
            captured = self.graphs[key]
            if captured is None:
                try:
                    captured = self.graphs[key] = self.capture(batch.to(device))
                except RuntimeError as error:
                    self.works = False
                    self.say(f"steps run without CUDA graphs: {str(error).splitlines()[0]}")
                    return self.compute(batch.to(device))
        graph, static, losses = captured
        static.input_ids.copy_(batch.input_ids)
        static.position_ids.copy_(batch.position_ids)
        graph.replay()
        return {name: loss.clone() for name, loss in losses.items()}

    def capture(self, static: Batch) -> tuple[torch.cuda.CUDAGraph, Batch, dict[str, Tensor]]:
        graph = torch.cuda.CUDAGraph()
        # other threads, as NCCL's, may go on with their own calls meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            losses = self.compute(static)
        return graph, static, losses
