"""Loading of models and tokenizers, by folder, run or hub id."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..model import DeltifyConfig, DeltifyForCausalLM
from ..model.causal_lm import CausalLM
from ..model.loading import check_shapes, checkpoint_shapes
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
    with named_errors(source):
        model = AutoModelForCausalLM.from_pretrained(model_folder(str(source)), dtype=dtype)
    return model.to(device).eval()


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder of a model, folder of a run (its furthest stage), or hub id."""
    with named_errors(source):
        tokenizer = AutoTokenizer.from_pretrained(model_folder(str(source)))
    assert tokenizer is not None
    return tokenizer


@contextlib.contextmanager
def named_errors(source: str | Path) -> Iterator[None]:
    """Add to the error of a hub id that cannot be loaded that there is no folder of this name."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if Path(source).expanduser().is_dir():
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FileNotFoundError(f"there is no folder {source}, and the hub does not give it: {reason}") from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors in the safetensors files of a folder.

    Raises:
        ValueError: If a file is damaged, missing or pickled.
    """
    checkpoint_shapes(str(folder), {})
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def renamed(tensors: dict[str, Tensor], pairs: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Return the tensors with parts of their names replaced."""

    def new_name(name: str) -> str:
        for old, new in pairs:
            name = name.replace(old, new)
        return name

    return {new_name(name): tensor for name, tensor in tensors.items()}


def model_of_tensors(config: DeltifyConfig, tensors: dict[str, Tensor], source: str) -> DeltifyForCausalLM:
    """Return a model with exactly these tensors, in their dtypes.

    Args:
        config: Configuration of the model.
        tensors: Tensors of the model by name.
        source: Name of the checkpoint, for errors.

    Raises:
        ValueError: If a tensor is missing, left over or of another shape.
    """
    with torch.device("meta"):
        model = DeltifyForCausalLM(config)
    if config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
        tensors = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    shapes = [{name: tuple(x.shape) for name, x in group.items()} for group in (tensors, model.state_dict())]
    check_shapes(shapes[0], shapes[1], tied=set(), source=source)
    tensors = {name: x.float() if name.endswith((".A_log", ".dt_bias")) else x for name, x in tensors.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    return model.eval()
