"""A transformers model: KDA in every layer, or in all but some. Importing registers it with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration import ArceeKDAConfig, DeltifyConfig
from .modeling import ArceeKDAForCausalLM, DeltifyForCausalLM, DeltifyKDA, DeltifyModel

__all__ = ["ArceeKDAConfig", "ArceeKDAForCausalLM", "DeltifyConfig", "DeltifyForCausalLM", "DeltifyKDA", "DeltifyModel"]

for config, model in ((DeltifyConfig, DeltifyForCausalLM), (ArceeKDAConfig, ArceeKDAForCausalLM)):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
AutoModel.register(DeltifyConfig, DeltifyModel, exist_ok=True)
