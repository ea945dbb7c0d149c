"""Helpers of several test modules: tiny runs, and small GGUF files with their models and tokenizers."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from deltify import distill
from deltify.config import Recipe, RunSpec, Stage, StudentSpec, TeacherSpec
from deltify.model import DeltifyConfig, DeltifyForCausalLM
from deltify.training import trainer
from deltify.training.steps import align_step

BLOCK_NAMES = {
    **{f"self_attn.{n}_proj": f"attn_{g}" for n, g in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))},
    **{f"self_attn.{n}_norm": f"attn_{n}_norm" for n in "qk"},
    **{f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")},
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER_NAMES = {"lm_head": "output", "model.embed_tokens": "token_embd", "model.norm": "output_norm"}


def small_tokenizer(special: tuple[str, ...] = ("<s>", "</s>")) -> PreTrainedTokenizerFast:
    """Byte-level BPE of some 270 tokens with a few merges, which a GGUF file must have; the first two special tokens
    begin and end texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator(["the cat and the hat, then and there 1234 1234"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1])


def small_model(tokenizer, architecture: str = "llama", **facts) -> PreTrainedModel:
    """A random model of two layers, with biases that are not zero."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"head_dim": 16, "num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 4096}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **(shape | facts))).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_((torch.randn_like(p) if name.endswith("bias") else p).bfloat16())
    return model


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer,
    *,
    pre: str | None = "gpt-2",
    keep: Callable[[str], bool] = lambda name: True,
    extra: Callable[[gguf.GGUFWriter], None] = lambda out: None,
) -> Path:
    """Writes a model as llama.cpp would, in float32.

    Args:
        keep: Tells by its name whether a tensor is written.
        extra: Adds keys and tensors.
    """
    c = model.config
    out, arch = gguf.GGUFWriter(str(path), c.model_type), c.model_type
    for key, value in (
        ("context_length", c.max_position_embeddings),
        ("embedding_length", c.hidden_size),
        ("block_count", c.num_hidden_layers),
        ("feed_forward_length", c.intermediate_size),
        ("attention.head_count", c.num_attention_heads),
        ("attention.head_count_kv", c.num_key_value_heads),
    ):
        out.add_uint32(f"{arch}.{key}", value)
    out.add_name("tiny")
    out.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", c.rms_norm_eps)
    out.add_float32(f"{arch}.rope.freq_base", c.rope_parameters["rope_theta"])
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    words = [word for word, _ in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])]
    special = {token["content"] for token in state["added_tokens"]}
    out.add_tokenizer_model("gpt2")
    if pre is not None:
        out.add_tokenizer_pre(pre)
    out.add_token_list(words)
    out.add_token_types([3 if word in special else 1 for word in words])
    out.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]])
    out.add_bos_token_id(tokenizer.bos_token_id)
    out.add_eos_token_id(tokenizer.eos_token_id)
    extra(out)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        stem, _, kind = name.rpartition(".")
        parts = stem.split(".")
        target = OUTER_NAMES.get(stem) or f"blk.{parts[2]}.{BLOCK_NAMES['.'.join(parts[3:])]}"
        if not keep(target := f"{target}.{kind}"):
            continue
        array = tensor.float().numpy()
        if arch == "llama" and ("attn_q." in target or "attn_k." in target):  # llama.cpp rotates neighbours
            heads = c.num_attention_heads if "attn_q." in target else c.num_key_value_heads
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        out.add_tensor(target, np.ascontiguousarray(array))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


# ---- tiny runs -------------------------------------------------------------------------------------------------------


def tiny_recipe(folder: Path, **changes) -> Recipe:
    """Return a recipe that runs in a second or two. It validates every 4 steps and saves every 2."""
    stage = Stage(tokens=8 * 2 * 32, sequence_length=32, batch_size=2)
    recipe = Recipe(
        name="tiny",
        output=str(folder),
        teacher=TeacherSpec(model="random:llama"),
        student=StudentSpec(calibration_tokens=256, calibration_sequence_length=32),
        align=stage,
        match=stage,
        run=RunSpec("cpu", "fp32", heldout_tokens=128, heldout_sequence_length=32, eval_every=4, save_every=2),
    )
    data = replace(recipe.data, folder=str(folder / "data"), max_tokens=5000)
    return replace(recipe, data=data, **changes)


def die_in_step(recipe: Recipe, step: int) -> None:
    """Run a recipe, and end it like a kill in the given step of align, counted from 0."""
    calls = []

    def dies(*args):
        calls.append(1)
        if len(calls) > step:
            raise KeyboardInterrupt
        return align_step(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "align_step", dies)
        distill(recipe)


def records(run: Path) -> list[dict]:
    """Return the records in metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(run: Path, other: Path, *stages: str) -> None:
    for stage in stages:
        got, want = (load_file(folder / stage / "model.safetensors") for folder in (run, other))
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want), stage


def flip(path: Path, place: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


KINDS = {"K": "linear_attention", "A": "full_attention", "S": "sliding_attention"}
EXPORT_SHAPES = {  # arguments of random_student that show what an export must get right
    "pure": {"kinds": "KKK"},
    "pure, tied, 128": {"kinds": "KK", "head_dim": 128, "tie_word_embeddings": True},
    "hybrid": {"kinds": "KKA", "num_key_value_heads": 2},
    "hybrid, GQA, tied": {"kinds": "KAK", "tie_word_embeddings": True},
    "hybrid, GQA, 128": {"kinds": "KA", "head_dim": 128},
}


def random_student(kinds: str = "KKA", **facts) -> DeltifyForCausalLM:
    """Return a model whose parameters all differ from zero and one, without biases.

    Args:
        kinds: A letter of KINDS for each layer.
        facts: Fields of its configuration.
    """
    shape = {"hidden_size": 128, "intermediate_size": 160, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape |= {"head_dim": 64, "initializer_range": 0.1, "num_hidden_layers": len(kinds)}
    torch.manual_seed(0)
    model = DeltifyForCausalLM(DeltifyConfig(layer_types=[KINDS[kind] for kind in kinds], **(shape | facts)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("conv1d.weight"):
                p.normal_(0, 0.5)
            if name.endswith("norm.weight"):
                p.uniform_(0.5, 1.5)
            if name.endswith(".bias"):
                p.zero_()
    return model.eval()
