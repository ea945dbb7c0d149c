"""Convert a pretrained transformer into a Kimi Delta Attention language model, and measure the result.

Importing it registers the model types `deltify` and `arcee_kda` with transformers' Auto classes.
"""

from importlib.metadata import PackageNotFoundError, version

from .config import DataSpec, Recipe, RunSpec, Stage, StudentSpec, TeacherSpec, load_recipe
from .conversion.student import convert
from .conversion.teacher import Teacher, load_teacher
from .evaluation.report import report
from .evaluation.runner import evaluate
from .evaluation.settings import BenchmarkSpec, DecodeSpec, EvaluationSpec, NeedleSpec, PositionSpec, RecallSpec
from .inference.states import State
from .model import ArceeKDAConfig, ArceeKDAForCausalLM, DeltifyConfig, DeltifyForCausalLM
from .ops import kda, kda_step
from .training.runner import distill

try:
    __version__ = version("deltify")  # pyproject.toml has the number
except PackageNotFoundError:  # run from its source without being installed
    __version__ = "unknown"

__all__ = [
    "ArceeKDAConfig",
    "ArceeKDAForCausalLM",
    "BenchmarkSpec",
    "DataSpec",
    "DecodeSpec",
    "DeltifyConfig",
    "DeltifyForCausalLM",
    "EvaluationSpec",
    "NeedleSpec",
    "PositionSpec",
    "RecallSpec",
    "Recipe",
    "RunSpec",
    "Stage",
    "State",
    "StudentSpec",
    "Teacher",
    "TeacherSpec",
    "convert",
    "distill",
    "evaluate",
    "kda",
    "kda_step",
    "load_recipe",
    "load_teacher",
    "report",
]
