"""The teacher of a run while its model is in memory. `teacher_cache` has the one whose outputs are on disk."""

import functools

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..config import STAGES, Recipe
from ..conversion.teacher import Teacher, load_teacher, random_teacher
from ..data.batches import Batch
from ..utils.fingerprint import fingerprint
from . import distributed
from .steps import hidden_states, layer_states


class LiveTeacher:
    """A `StageTeacher` whose model is in memory, whole or sharded over the ranks."""

    can_be_graphed = True

    def __init__(self, pretrained: Teacher):
        self.pretrained, self.model, self.sharded = pretrained, pretrained.model, False

    @property
    def config(self) -> PreTrainedConfig:
        return self.pretrained.config

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.pretrained.tokenizer

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.model)

    def hidden_states(self, batch: Batch) -> Tensor:
        return hidden_states(self.model, batch)

    def layer_states(self, batch: Batch) -> list[Tensor]:
        return layer_states(self.model, batch, output_hidden_states=True)

    def head(self) -> Tensor:
        return distributed.full_tensor(self.model.lm_head.weight)

    def attention_layers(self) -> list[nn.Module]:
        return [layer.self_attn for layer in self.model.model.layers]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def shard(self) -> None:
        if not self.sharded:
            distributed.shard_teacher(self.model)
            self.sharded = True


def open_teacher(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Teacher:
    """Load the teacher of a recipe.

    Raises:
        ValueError: If a stage has longer sequences than the teacher's context window. extend may have them if its
            ce_weight is above 0.
    """
    spec = recipe.teacher
    if spec.model.startswith("random:"):
        return random_teacher(spec.model.removeprefix("random:"))
    teacher = load_teacher(
        spec.model, dtype=dtype, device=device, trust_remote_code=spec.trust_remote_code, revision=spec.revision
    )
    context_window = teacher.config.max_position_embeddings
    for name in STAGES:
        stage = recipe.stage(name)
        if stage.tokens and stage.sequence_length > context_window and (name != "extend" or stage.ce_weight == 0):
            raise ValueError(
                f"{name}.sequence_length={stage.sequence_length} exceeds the teacher's context window "
                f"({context_window} tokens). Lower it, or give extend a ce_weight above 0"
            )
    return teacher
