"""Controls that a student must beat: its teacher with a sliding window, and itself with its state zeroed.

Legend: B batch, T tokens, D model width, H heads, K key width, V value width.
"""

import copy
from itertools import chain, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..conversion.student import sliding_control
from ..conversion.teacher import Teacher
from ..inference.prefill import key_value_bytes
from ..model import DeltifyForCausalLM, DeltifyKDA
from ..model.cache import DeltifyCache
from ..model.mixers import Packing


def make_controls(
    teacher: Teacher, student: PreTrainedModel, *, window: int = 64, sinks: int = 4, chunk: int = 64
) -> dict[str, DeltifyForCausalLM]:
    """Return the controls of a student by name. They share weights with teacher and student.

    - The untrained teacher with a sliding window of `window` tokens and `sinks` first tokens (StreamingLLM).
    - The same with a window whose cache takes as many bytes in a layer as the states of one KDA layer.
    - The student with its states zeroed every `chunk` tokens.

    Raises:
        ValueError: If the student is no model of deltify.
    """
    if not isinstance(student, DeltifyForCausalLM):
        raise ValueError(
            f"A {type(student).__name__} has no states to compare controls with. Leave the controls out: --no-controls"
        )
    equal = equal_window(teacher, student, sinks)
    return {
        f"teacher, window {window}": sliding_control(teacher, window=window, sinks=sinks),
        f"teacher, window {equal} (the states' bytes)": sliding_control(teacher, window=equal, sinks=sinks),
        f"student, state zeroed every {chunk}": zero_state_every(student, chunk),
    }


def layer_state_bytes(student: DeltifyForCausalLM, element_bytes: int = 2) -> int:
    """Return the bytes of one KDA layer's states.

    They are the recurrent state [H, K, V] in float32 and the convolution state [3 H K, taps - 1].

    Args:
        element_bytes: Bytes of an element of the convolution state.
    """
    config = student.config
    assert config.head_dim is not None  # the configuration fills it in
    inner = config.num_attention_heads * config.head_dim
    return 4 * inner * config.head_dim + element_bytes * 3 * inner * (config.conv_size - 1)


def equal_window(teacher: Teacher, student: DeltifyForCausalLM, sinks: int = 4, element_bytes: int = 2) -> int:
    """Return the window whose cache takes as many bytes in a layer as the states of a KDA layer.

    A layer with a window of W tokens keeps `sinks` + W - 1 tokens, since the newest query comes with its own key.

    Args:
        element_bytes: Bytes of an element of keys and values. Defaults to those of bfloat16.
    """
    tokens = layer_state_bytes(student, element_bytes) // key_value_bytes(teacher.config, element_bytes)
    return max(1, tokens - sinks + 1)


def zero_state_every(student: DeltifyForCausalLM, chunk: int) -> DeltifyForCausalLM:
    """Return the student with the states of its KDA layers zeroed every `chunk` tokens.

    Weights are shared. Attention layers keep all tokens.

    Raises:
        ValueError: If `chunk` is below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 token.")
    shared = {id(x): x for x in chain(student.parameters(), student.buffers())}
    model = copy.deepcopy(student, shared)
    for layer in model.model.layers:
        if layer.linear:
            layer.self_attn = ForgetfulKDA(layer.self_attn, chunk)
    return model.eval()


class ForgetfulKDA(nn.Module):
    """A KDA layer whose convolution and recurrent states are zeroed every `chunk` tokens.

    Without a cache, tokens are counted from the start of each document. With one, all sequences of a batch count
    together, padding included.
    """

    def __init__(self, mixer: DeltifyKDA, chunk: int):
        super().__init__()
        self.mixer, self.chunk, self.layer_idx = mixer, chunk, mixer.layer_idx

    def forward(
        self, hidden_states: Tensor, cache: DeltifyCache | None = None, packing: Packing | None = None
    ) -> Tensor:
        """Return the output [B, T, D] for hidden states [B, T, D], as `DeltifyKDA.forward` does."""
        if cache is None:
            return self.mixer(hidden_states, None, self.split_documents(hidden_states, packing))
        batch, tokens = hidden_states.shape[:2]
        mask_BT = torch.ones(batch * tokens, dtype=torch.bool, device=hidden_states.device)
        if packing is not None and packing.index is not None:
            mask_BT = torch.zeros_like(mask_BT).index_fill(0, packing.index, True)
        mask_BT, outputs = mask_BT.view(batch, tokens), []
        first_zeroing = -cache.seen_tokens % self.chunk
        for begin, end in pairwise(sorted({0, tokens, *range(first_zeroing, tokens, self.chunk)})):
            if (cache.seen_tokens + begin) % self.chunk == 0:
                cache.layers[self.layer_idx].reset()
            x_BTD, part_mask_BT, part = hidden_states[:, begin:end], mask_BT[:, begin:end], None
            if packing is not None:
                bounds = F.pad(part_mask_BT.sum(1).cumsum(0), (1, 0)).int()
                part = Packing(part_mask_BT.flatten().nonzero().squeeze(1), bounds)
            if packing is not None and not part_mask_BT.any():  # padding alone
                outputs.append(torch.zeros_like(x_BTD))
            else:
                outputs.append(self.mixer(x_BTD, cache, part))
        return torch.cat(outputs, 1)

    def split_documents(self, x_BTD: Tensor, packing: Packing | None) -> Packing:
        """Return the packing in which every chunk is a document."""
        batch, tokens = x_BTD.shape[:2]
        if packing is None:
            packing = Packing(None, torch.arange(0, batch * tokens + 1, tokens, device=x_BTD.device))
        bounds = packing.cu_seqlens.tolist()
        starts = [at for begin, end in pairwise(bounds) for at in range(begin, end, self.chunk)]
        return Packing(packing.index, torch.tensor([*starts, bounds[-1]], dtype=torch.int32, device=x_BTD.device))
