"""deltify: turn a pretrained transformer into a Kimi Delta Attention language model, and prove what came out.

Importing it registers the model types `deltify` and `arcee_kda` with transformers' Auto classes.
"""

from .config import Recipe, read_recipe
from .convert import convert
from .distill import distill
from .evaluate import evaluate
from .model import ArceeKDAConfig, ArceeKDAForCausalLM, DeltifyConfig, DeltifyForCausalLM
from .ops import kda, kda_step
from .report import report
from .states import load_state, read
from .teacher import load_teacher

__version__ = "0.1.0"
__all__ = [
    "ArceeKDAConfig",
    "ArceeKDAForCausalLM",
    "DeltifyConfig",
    "DeltifyForCausalLM",
    "Recipe",
    "convert",
    "distill",
    "evaluate",
    "kda",
    "kda_step",
    "load_state",
    "load_teacher",
    "read",
    "read_recipe",
    "report",
]
