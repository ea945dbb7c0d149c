"""Generation for models whose states cannot be rolled back; unsupported settings are refused."""

import copy
import functools

from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin
from transformers.generation import GenerationMode

from .cache import DeltifyCache, held
from .configuration import DeltifyConfig, has_rope

CACHE_NAMES = ("past_key_values", "cache")  # before transformers 5.24, and since
# generation settings that need another cache, a cache that can be rolled back, or code for other models
UNSUPPORTED = (
    *("cache_implementation", "cache_config", "max_cache_len", "compile_config", "continuous_batching_config"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "use_mtp", "assistant_early_exit", "is_assistant"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type"),
    *("penalty_alpha", "low_memory", "dola_layers"),
)


class DeltifyGenerationMixin(GenerationMixin):
    """transformers' generation with a `DeltifyCache`. Settings that need another cache are refused."""

    config: DeltifyConfig

    def init_continuous_batching(self, *args, **kwargs):
        raise ValueError(
            f"continuous batching pages keys and values, but a {type(self).__name__} has states instead. Call generate "
            "with a batch of sequences"
        )

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # transformers looks at the signature
    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        mask, tokens = inputs.get("attention_mask"), inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        # a step of one token reads its position only where a layer rotates queries and keys
        positioned = tokens is not None and (tokens.shape[1] > 1 or has_rope(self.config))
        if mask is not None and mask.dim() == 2 and positioned:
            # transformers counts new tokens after padding on the right from 1
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            inputs["position_ids"] = positions[:, -tokens.shape[1] :]
        return inputs

    def _validate_generation_mode(self, generation_mode: GenerationMode, *args, **kwargs):
        if generation_mode in ("assisted_generation", "contrastive_search"):
            raise ValueError(
                f"{generation_mode.value!s} discards tokens, but {type(self).__name__} is stateful: the states of its "
                "KDA and sliding layers cannot be rolled back. Leave out assistant_model, use_mtp, penalty_alpha, "
                "prompt_lookup_num_tokens and assistant_early_exit"
            )
        # transformers declares `self` as a whole model, which a mixin is not
        # pyrefly: ignore[bad-argument-type]
        super()._validate_generation_mode(generation_mode, *args, **kwargs)

    def _get_logits_processor(self, generation_config: GenerationConfig, *args, **kwargs):
        masks = (kwargs.get("model_kwargs") or {}).get("attention_mask"), kwargs.get("negative_prompt_attention_mask")
        if generation_config.guidance_scale not in (None, 1) and any(map(padded_on_the_right, masks)):
            raise ValueError(
                "guidance_scale with padding on the right: the branch without the prompt would begin with padding. Pad "
                "on the left, or leave guidance_scale out"
            )
        # pyrefly: ignore[bad-argument-type]
        return super()._get_logits_processor(generation_config, *args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config: GenerationConfig, model_kwargs: dict, *args, **kwargs):
        if generation_config.is_assistant:
            raise ValueError(
                f"assistant_model is a {type(self).__name__}, which cannot draft: it is stateful, and the states of "
                "its KDA and sliding layers cannot be rolled back when a draft is rejected. Leave it out"
            )
        if (kind := generation_config.cache_implementation) not in (None, "dynamic"):
            raise ValueError(f"cache_implementation={kind!r} cannot hold KDA and sliding layers. Leave it out")
        right = padded_on_the_right(model_kwargs.get("attention_mask"))
        if generation_config.prefill_chunk_size is not None and right:
            raise ValueError(
                "prefill_chunk_size with padding on the right: the last chunk of a prompt must contain its last token. "
                "Pad on the left, or leave prefill_chunk_size out"
            )
        for name in CACHE_NAMES:
            given = model_kwargs.get(name)
            empty = type(given) is DynamicCache and not any(map(held, given.layers))
            if given is not None and not empty and not isinstance(given, DeltifyCache):
                raise ValueError(
                    f"{name} is a {type(given).__name__}, which this model cannot continue from. Give a "
                    "DeltifyCache(config=model.config), or leave it out"
                )
            if given is not None and not empty:
                mask = model_kwargs.get("attention_mask")
                # since 5.24, transformers drops a mask of ones and keeps its length
                length = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[-1]
                check_continued(given, length, generation_config.use_cache)
        # pyrefly: ignore[bad-argument-type]
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        for name in CACHE_NAMES:
            if type(model_kwargs.get(name)) is DynamicCache:
                model_kwargs[name] = DeltifyCache(config=self.config)
        return result


def check_continued(cache: DynamicCache, length: int | None, use_cache: bool | None) -> None:
    """Raise ValueError if `generate` would read tokens into a cache once more, or leave some out.

    Args:
        cache: Cache to continue.
        length: Length of the attention mask, which is that of the input or also counts the tokens of the cache. None if
            it is not known.
        use_cache: The setting of `generate`.
    """
    if use_cache is False:
        raise ValueError("use_cache=False beside a cache, into which each token would read the whole text. Give True")
    if length is not None and 0 <= length <= (seen := cache.get_seq_length()):
        raise ValueError(
            f"the cache holds {seen} tokens, and the input has {length}. Give the whole text so far and one new token "
            "at least, or the new tokens with an attention_mask over all of them"
        )


def padded_on_the_right(mask: Tensor | None) -> bool:
    """Return whether a mask [B, T] marks padding after a sequence's tokens."""
    return mask is not None and mask.dim() == 2 and not bool(mask[:, -1].all())


def supported_settings(settings: GenerationConfig) -> tuple[GenerationConfig, list[str]]:
    """Return a copy of a teacher's generation settings without unsupported ones, and the names of those."""
    default = GenerationConfig()
    dropped = [name for name in UNSUPPORTED if getattr(settings, name, None) != getattr(default, name, None)]
    if not dropped:
        return copy.deepcopy(settings), dropped
    kept = {name: value for name, value in settings.to_dict().items() if name not in dropped}
    supported = GenerationConfig.from_dict(kept)
    # as if read from a file: transformers does not save settings that were changed and are ignored, such as top_p alone
    supported._original_object_hash = hash(supported)
    return supported, dropped
