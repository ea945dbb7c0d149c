"""The type of a model that an Auto class returns."""

from transformers import GenerationMixin, PreTrainedModel


class CausalLM(PreTrainedModel, GenerationMixin):
    """Annotates a causal language model of any family. transformers has no public base class for these."""
