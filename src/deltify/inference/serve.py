"""An OpenAI-compatible endpoint: the server of transformers, with deltify's models registered."""

from pathlib import Path

import transformers
from huggingface_hub.constants import HF_HUB_CACHE
from transformers.utils.import_utils import is_serve_available

from ..model import ArceeKDAForCausalLM, DeltifyForCausalLM
from ..utils.folders import model_folder


def serve(path: str | Path, *, host: str = "localhost", port: int = 8000, device: str = "auto") -> None:
    """Serve /v1/chat/completions, /v1/completions and /v1/responses until the process is stopped.

    Args:
        path: Folder of a model, folder of a run (its furthest stage), or hub id. Chat needs a tokenizer with a chat
            template.
        host: Name or address to listen on.
        port: Port to listen on.
        device: Device of the model. "auto" may spread it over several GPUs.

    Raises:
        ValueError: If the server's packages are not installed.
    """
    if not is_serve_available():
        raise ValueError("Serving needs packages that are not installed. Run: pip install 'deltify[serve]'")
    from transformers.cli.serve import Serve

    # the server looks classes up in transformers by name, not through the Auto classes
    for model in (DeltifyForCausalLM, ArceeKDAForCausalLM):
        setattr(transformers, model.__name__, model)
    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)  # /v1/models fails without it
    Serve(model_folder(str(path)), host=host, port=port, device=device)
