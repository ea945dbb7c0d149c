import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported, which reads it then

import pytest
import torch
import torch.distributed as dist
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported


def with_special_tokens(tokenizer: PreTrainedTokenizerBase, *, end: bool) -> PreTrainedTokenizerBase:
    """Makes the byte tokenizer begin every text with the token of byte 0, and with `end` end it with its last token."""
    start, stop = "\u0100", tokenizer.eos_token
    tokenizer.add_special_tokens({"bos_token": start})
    template = f"{start} $A {stop}" if end else f"{start} $A"
    ids = [(start, tokenizer.bos_token_id), (stop, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    whole = tokenizer("a")["input_ids"]
    assert whole[0] == tokenizer.bos_token_id != tokenizer.eos_token_id and len(whole) == 2 + end
    return tokenizer


def pytest_collection_modifyitems(items):
    # the slowest files first, so that none waits for them
    items.sort(key=lambda item: item.path.stem not in ("test_parallel", "test_shards"))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU on this machine"))


@pytest.fixture(autouse=True, scope="session")
def short_samples():
    """Validations of tiny runs write short samples, which take a quarter of a run's time otherwise."""
    from deltify.training import samples  # not earlier: the environment must be set first

    samples.NEW_TOKENS = 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The tiny recipe's run, unbroken."""
    from helpers import tiny_recipe  # not earlier: the environment must be set first

    from deltify import distill

    return distill(tiny_recipe(tmp_path_factory.mktemp("whole")))


@pytest.fixture(scope="module")
def one_thread():
    """Tiny models are no faster on more, and far slower where other programs want the processor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
