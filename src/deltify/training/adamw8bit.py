"""8-bit Adam for sharded models. It needs bitsandbytes.

bitsandbytes updates plain tensors. So each process gives it the rows that it holds.
"""

from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit
from torch import Tensor
from torch.distributed.tensor import DTensor, zeros

from ..model.shards import own_part
from .optimizers import BLOCK, has_eight_bit_shards

SCALES = ("absmax1", "absmax2")


class ShardedAdamW8bit(AdamW8bit):
    """Gives the results of `AdamW8bit` for parameters that are sharded by rows.

    Moments are float32 where `has_eight_bit_shards` is false. All states are sharded as the parameters, so another
    number of processes can load them.
    """

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        bits = 8 if has_eight_bit_shards(self.param_groups[gindex]["params"][pindex]) else 32
        return super().get_config(gindex, pindex, group) | {"optim_bits": bits, "min_8bit_size": 0}

    @torch.no_grad()
    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        super().init_state(group, p, gindex, pindex)
        assert isinstance(p, DTensor)
        for name in SCALES:
            if name not in self.state[p]:
                continue
            shape = (len(p), p.numel() // len(p) // BLOCK)
            self.state[p][name] = zeros(*shape, device_mesh=p.device_mesh, placements=p.placements)

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        rows, state = own_part(p), self.state[p]
        if not len(rows):  # there may be more processes than rows
            state["step"] += 1
            return
        assert p.grad is not None
        rows.grad = own_part(p.grad)
        own = {name: own_part(x) for name, x in state.items()}
        self.state[rows] = own | {name: own[name].flatten() for name in SCALES if name in own}  # views
        super().update_step(group, rows, gindex, pindex)
        state["step"] = self.state.pop(rows)["step"]
