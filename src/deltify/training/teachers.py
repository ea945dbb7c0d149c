"""The teacher of a run while its model is in memory. `teacher_cache` has the one whose outputs are on disk."""

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..config import STAGES, Recipe
from ..conversion.teacher import Teacher, load_teacher, random_teacher
from ..data.batches import Batch
from ..model.configuration import has_fixed_rope
from ..model.context_parallel import cut_mask
from ..ops import earlier_keys
from ..utils.fingerprint import fingerprint
from .steps import layer_states, segment, segment_of

CUT_ATTENTION = "deltify_cut_rows"


def cut_attention(module, q, k, v, attention_mask, *, row_group: dist.ProcessGroup, **kwargs) -> tuple[Tensor, None]:
    """Compute the attention of this rank's segments to those up to its own, as an implementation for transformers."""
    keys, values = earlier_keys(k, v, row_group)
    return sdpa_attention_forward(module, q, keys, values, attention_mask, **kwargs)


AttentionInterface.register(CUT_ATTENTION, cut_attention)


class LiveTeacher:
    """A `StageTeacher` whose model is in memory, whole or sharded over the ranks."""

    can_be_graphed = True

    def __init__(self, pretrained: Teacher):
        self.pretrained, self.model = pretrained, pretrained.model

    @property
    def config(self) -> PreTrainedConfig:
        return self.pretrained.config

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.pretrained.tokenizer

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.model)

    def hidden_states(self, batch: Batch, row_group: dist.ProcessGroup | None = None) -> Tensor:
        return self.states(batch, row_group, output_hidden_states=False)[0]

    def layer_states(self, batch: Batch, row_group: dist.ProcessGroup | None = None) -> list[Tensor]:
        return self.states(batch, row_group, output_hidden_states=True)

    def states(self, batch: Batch, row_group: dist.ProcessGroup | None, *, output_hidden_states: bool) -> list[Tensor]:
        if row_group is None:
            return layer_states(self.model, batch, output_hidden_states=output_hidden_states)
        if not self.can_be_cut:
            rows = len(batch.input_ids)
            whole = layer_states(self.model, batch, output_hidden_states=output_hidden_states)
            return [segment(x.unflatten(0, (rows, -1)), row_group).flatten(0, 1) for x in whole]
        options = {"attention_mask": cut_mask(batch.position_ids, row_group), "row_group": row_group}
        implementation, self.config._attn_implementation = self.config._attn_implementation, CUT_ATTENTION
        try:
            own = segment_of(batch, row_group)
            return layer_states(self.model, own, output_hidden_states=output_hidden_states, **options)
        finally:
            self.config._attn_implementation = implementation

    @functools.cached_property
    def can_be_cut(self) -> bool:
        """Whether the model computes a segment of a row from the keys and values of the earlier ones.

        It does without sliding windows, and if RoPE does not depend on the length of the row.
        """
        slides = any(self.pretrained.family.slides(self.config))
        return not slides and has_fixed_rope(self.config) and self.config._attn_implementation == "sdpa"

    def head(self) -> Tensor:
        return self.model.lm_head.weight

    def attention_layers(self) -> list[nn.Module]:
        return [layer.self_attn for layer in self.model.model.layers]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())


def open_teacher(
    recipe: Recipe, device: torch.device, dtype: torch.dtype, shard: Callable[[PreTrainedModel], None] | None = None
) -> Teacher:
    """Load the teacher of a recipe.

    Args:
        shard: Function that shards the teacher over the ranks, see `load_teacher`.

    Raises:
        ValueError: If a stage, the validation or the calibration has longer sequences than the teacher's context
            window. extend may have them if its ce_weight is above 0.
    """
    spec = recipe.teacher
    if spec.model.startswith("random:"):
        return random_teacher(spec.model.removeprefix("random:"))
    options = {"trust_remote_code": spec.trust_remote_code, "revision": spec.revision, "shard": shard}
    teacher = load_teacher(spec.model, dtype=dtype, device=device, **options)
    context_window = teacher.config.max_position_embeddings
    for name in STAGES:
        stage = recipe.stage(name)
        if stage.tokens and stage.sequence_length > context_window and (name != "extend" or stage.ce_weight == 0):
            raise ValueError(
                f"{name}.sequence_length={stage.sequence_length} exceeds the teacher's context window "
                f"({context_window} tokens). Lower it, or give extend a ce_weight above 0"
            )
    lengths = {"run.heldout_sequence_length": recipe.run.heldout_sequence_length}
    if recipe.student.init.startswith("calibrated"):
        lengths["student.calibration_sequence_length"] = recipe.student.calibration_sequence_length
    for field, length in lengths.items():
        if length > context_window:
            raise ValueError(
                f"{field}={length} exceeds the teacher's context window ({context_window} tokens), beyond which its "
                "predictions mean nothing. Lower it"
            )
    return teacher
