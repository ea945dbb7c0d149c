"""An OpenAI-compatible endpoint: transformers' own server, with deltify's models made known to it."""

from pathlib import Path

import transformers
from huggingface_hub.constants import HF_HUB_CACHE
from transformers.utils.import_utils import is_serve_available

from ..model import ArceeKDAForCausalLM, DeltifyForCausalLM
from ..utils.folders import model_folder


def serve(path: str, *, host: str = "localhost", port: int = 8000, device: str = "auto") -> None:
    """Answers /v1/chat/completions, /v1/completions and /v1/responses until the process is stopped.

    Args:
        path: model folder, run folder (its furthest stage), or hub id; chat needs a tokenizer with a chat template.

    Raises:
        ValueError: if the server's packages are not installed.
    """
    if not is_serve_available():
        raise ValueError("serving needs packages that are not installed; run: pip install 'deltify[serve]'")
    from transformers.cli.serve import Serve

    # the server takes a model's class by its name from transformers itself, whatever the Auto classes know
    for model in (DeltifyForCausalLM, ArceeKDAForCausalLM):
        setattr(transformers, model.__name__, model)
    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)  # /v1/models fails without it
    Serve(model_folder(path), host=host, port=port, device=device)
