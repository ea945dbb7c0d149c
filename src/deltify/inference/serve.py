"""The server of transformers, an OpenAI-compatible endpoint, with deltify's models registered and its page added."""

from pathlib import Path
from typing import cast

import transformers
from huggingface_hub.constants import HF_HUB_CACHE
from transformers.utils.import_utils import is_serve_available

from ..model import ArceeKDAForCausalLM, DeltifyForCausalLM
from ..model.causal_lm import CausalLM
from ..utils.folders import model_folder
from .loading import load_tokenizer


def serve(path: str | Path, *, host: str = "localhost", port: int = 8000, device: str = "auto") -> None:
    """Serve /v1/chat/completions, /v1/completions, /v1/responses and a page until the process is stopped.

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
        raise ValueError(
            "Serving needs packages that are not installed. Run, in a clone of deltify: pip install -e '.[serve]'"
        )
    from fastapi import FastAPI
    from transformers.cli.serve import Serve

    from .page import page_routes

    # the server looks classes up in transformers by name, not through the Auto classes
    for model in (DeltifyForCausalLM, ArceeKDAForCausalLM):
        setattr(transformers, model.__name__, model)
    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)  # /v1/models fails without it
    folder = model_folder(str(path))
    name = "/".join(Path(folder).parts[-2:])

    class Server(Serve):
        def start_server(self) -> None:
            """Add the page and run. transformers calls this instead of running if `non_blocking` is true."""
            [loaded] = self._model_manager.loaded_models.values()
            loaded.model.generation_config.do_sample = True  # otherwise temperature and seed of requests do nothing
            app = cast(FastAPI, self.server.config.app)
            app.include_router(page_routes(cast(CausalLM, loaded.model), load_tokenizer(folder), name))
            print(f"model for requests: {folder}\npage: http://{host}:{port}/", flush=True)
            self.server.run()

    Server(folder, host=host, port=port, device=device, non_blocking=True)
