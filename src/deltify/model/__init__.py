"""A transformers model with KDA in all or some layers. Importing it registers the model with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration import ArceeKDAConfig, DeltifyConfig
from .mixers import DeltifyKDA
from .modeling import ArceeKDAForCausalLM, ArceeKDAModel, DeltifyForCausalLM, DeltifyModel

__all__ = ["ArceeKDAConfig", "ArceeKDAForCausalLM", "DeltifyConfig", "DeltifyForCausalLM", "DeltifyKDA", "DeltifyModel"]

for config, base, model in (
    (DeltifyConfig, DeltifyModel, DeltifyForCausalLM),
    (ArceeKDAConfig, ArceeKDAModel, ArceeKDAForCausalLM),
):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, base, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
