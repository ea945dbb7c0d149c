"""Loading of models and tokenizers, by folder, run or hub id."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..model.causal_lm import CausalLM
from ..utils.folders import model_folder


def load_model(
    source: str | Path, *, device: str | torch.device = "cpu", dtype: str | torch.dtype = "auto"
) -> CausalLM:
    """Load a causal language model, ready to run.

    Args:
        source: Folder of a model, folder of a run (its furthest stage), or hub id.
        device: Device to load to.
        dtype: Data type of the weights. "auto" keeps that of the checkpoint.
    """
    return AutoModelForCausalLM.from_pretrained(model_folder(str(source)), dtype=dtype).to(device).eval()


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder of a model, folder of a run (its furthest stage), or hub id."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder(str(source)))
    assert tokenizer is not None
    return tokenizer
