"""GGUF files: every tensor and key is used, or refused by name."""

import json

import numpy as np
import pytest
import torch
from helpers import small_model, small_tokenizer, write_gguf
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from deltify.conversion import gguf_files, teacher
from deltify.conversion.gguf_files import SPLITS, halves_from_neighbours, mark_spaces
from deltify.conversion.teacher import load_teacher
from deltify.model import shards

IDS = torch.arange(3, 43).view(1, 40)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@torch.no_grad()
def assert_same(got, want) -> None:
    assert torch.equal(got(IDS).logits, want(IDS).logits)


@pytest.mark.parametrize(
    "architecture, facts",
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
    ],
)
def test_a_file_gives_the_model_that_it_was_written_from(architecture, facts, tokenizer, tmp_path):
    model = small_model(tokenizer, architecture, **facts)

    def extra(out):
        out.add_uint32(f"{architecture}.attention.key_length", model.config.head_dim)
        out.add_uint32(f"{architecture}.attention.value_length", model.config.head_dim)

    assert architecture != "llama" or not facts.get("attention_bias") or model.config.attention_bias
    read = load_teacher(str(write_gguf(tmp_path / "model.gguf", model, tokenizer, extra=extra)))
    assert_same(read.model, model)
    assert read.config.tie_word_embeddings == facts.get("tie_word_embeddings", False)


def test_a_split_file_is_joined_from_any_of_its_parts_and_missing_parts_are_named(tokenizer, tmp_path):
    model = small_model(tokenizer)

    def part(number):
        def extra(out):
            out.add_uint16("split.no", number)
            out.add_uint16("split.count", 2)

        return extra

    first, second = (tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2))
    write_gguf(first, model, tokenizer, keep=lambda name: not name.startswith("blk.1."), extra=part(0))
    with pytest.raises(FileNotFoundError, match=r"one part of 2; m-00002-of-00002\.gguf must lie beside it"):
        load_teacher(str(first))
    write_gguf(second, model, tokenizer, keep=lambda name: name.startswith("blk.1."), extra=part(1))
    for path in (first, second):
        assert_same(load_teacher(str(path)).model, model)
    renamed = first.rename(tmp_path / "whole.gguf")
    with pytest.raises(ValueError, match="one part of 2, but 1 were found"):
        load_teacher(str(renamed))


@pytest.mark.parametrize(
    "facts, keep, message",
    [
        ({}, lambda name: name != "blk.1.ffn_down.weight", r"blk\.1\.ffn_down\.weight is missing"),
        ({}, lambda name: name != "output_norm.weight", r"output_norm\.weight is missing"),
        ({"num_hidden_layers": 3}, None, r"blk\.2\.attn_k\.weight is not expected"),
        ({"attention_bias": True}, lambda name: name != "blk.0.attn_output.bias", r"attn_output\.bias is missing"),
        ({"attention_bias": True}, lambda name: name != "blk.0.attn_q.bias", r"blk\.0\.attn_k\.bias is not expected"),
        ({"intermediate_size": 80}, None, r"ffn_down\.weight has shape \[64, 80\], expected \[64, 96\]"),
    ],
)
def test_tensors_that_are_missing_left_over_or_of_another_shape_are_named(facts, keep, message, tokenizer, tmp_path):
    model = small_model(tokenizer, **facts)
    model.config.num_hidden_layers, model.config.intermediate_size = 2, 96  # as in the file's keys
    path = write_gguf(tmp_path / "model.gguf", model, tokenizer, keep=keep or (lambda name: True))
    with pytest.raises(ValueError, match=message):
        load_teacher(str(path))
    assert not (tmp_path / "cache").exists() or not [*tmp_path.glob("cache/gguf/model-*/*")]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
)
def test_scaled_positions_are_those_of_the_model(rope, tokenizer, tmp_path):
    model = small_model(tokenizer, rope_parameters={"rope_theta": 500000.0, **rope})

    def extra(out):
        if rope["rope_type"] == "llama3":  # llama.cpp keeps the factors by which wavelengths grow
            plain = 500000.0 ** -(torch.arange(0, 16, 2) / 16)
            out.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy())
            return
        out.add_string("llama.rope.scaling.type", rope["rope_type"])
        out.add_float32("llama.rope.scaling.factor", rope["factor"])
        if rope["rope_type"] == "yarn":
            out.add_uint32("llama.rope.scaling.original_context_length", 1024)

    read = load_teacher(str(write_gguf(tmp_path / "model.gguf", model, tokenizer, extra=extra))).model
    assert torch.equal(read.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert_same(read, model)


def test_a_factor_without_a_type_is_linear_as_in_llama_cpp(tokenizer, tmp_path):
    model = small_model(tokenizer, rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0})
    extra = lambda out: out.add_float32("llama.rope.scaling.factor", 4.0)  # noqa: E731
    assert_same(load_teacher(str(write_gguf(tmp_path / "model.gguf", model, tokenizer, extra=extra))).model, model)


def test_factors_of_an_unknown_scaling_are_refused(tokenizer, tmp_path):
    extra = lambda out: out.add_tensor("rope_freqs.weight", np.linspace(1, 3, 8, dtype=np.float32))  # noqa: E731
    path = write_gguf(tmp_path / "model.gguf", small_model(tokenizer), tokenizer, extra=extra)
    with pytest.raises(ValueError, match="not Llama 3's factors"):
        load_teacher(str(path))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("llama.attn_logit_softcapping", 30.0, r"has llama\.attn_logit_softcapping = 30\.0, which is not understood"),
        ("llama.expert_count", 8, r"llama\.expert_count = 8"),
        ("llama.attention.sliding_window", 64, r"Sliding windows are supported in"),
        ("llama.rope.dimension_count", 8, r"rope\.dimension_count = 8 but heads of 16"),
        ("llama.vocab_size", 999, r"vocab_size = 999 for \d+ embeddings"),
        ("llama.rope.scaling.type", "longrope", r"scaling\.type = 'longrope'; supported are none, linear"),
        ("general.type", "adapter", "holds a adapter, not a whole model"),
    ],
)
def test_keys_that_would_change_results_are_refused_by_name(key, value, message, tokenizer, tmp_path):
    def extra(out):
        if key == "general.type":
            out.kv_data[0].pop("general.type", None)
        kinds = {float: out.add_float32, int: out.add_uint32, str: out.add_string}
        kinds[type(value)](key, value)

    path = write_gguf(tmp_path / "model.gguf", small_model(tokenizer), tokenizer, extra=extra)
    with pytest.raises(ValueError, match=message):
        load_teacher(str(path))


def test_keys_that_change_nothing_are_accepted(tokenizer, tmp_path):
    def extra(out):
        out.add_uint32("llama.expert_count", 0)
        out.add_uint32("llama.attention.sliding_window", 4096)  # as long as the context
        out.add_uint32("llama.rope.dimension_count", 16)

    model = small_model(tokenizer)
    assert_same(load_teacher(str(write_gguf(tmp_path / "model.gguf", model, tokenizer, extra=extra))).model, model)


def test_text_is_split_and_begun_as_the_file_says(tokenizer, tmp_path):
    model, text = small_model(tokenizer), "the cat 1234 then"
    for pre, begins in (("gpt-2", False), ("smollm", False), ("llama-bpe", True)):
        path = write_gguf(tmp_path / f"{pre}.gguf", model, tokenizer, pre=pre)
        read = load_teacher(str(path)).tokenizer
        pieces = [piece for piece, _ in read.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 12345, it's")]
        assert (
            pieces
            == {
                "gpt-2": ["in", "Ġ12345", ",", "Ġit", "'s"],
                "smollm": ["in", "Ġ", "1", "2", "3", "4", "5", ",", "Ġit", "'s"],
                "llama-bpe": ["in", "Ġ", "123", "45", ",", "Ġit", "'s"],
            }[pre]
        )
        ids = read(text)["input_ids"]
        assert (ids[0] == tokenizer.bos_token_id) == begins
        assert read.decode(ids, skip_special_tokens=True) == text
    extra = lambda out: (out.add_add_bos_token(True), out.add_add_eos_token(True))  # noqa: E731
    read = load_teacher(str(write_gguf(tmp_path / "both.gguf", model, tokenizer, extra=extra))).tokenizer
    ids = read(text)["input_ids"]
    assert [ids[0], ids[-1]] == [tokenizer.bos_token_id, tokenizer.eos_token_id]


@pytest.mark.parametrize("prefix, word", [(True, "▁the▁cat"), (False, "the▁cat")])
def test_a_sentencepiece_vocabulary_marks_spaces_as_llama_cpp_does(prefix, word):
    vocabulary = {"<unk>": 0, "<s>": 1, word: 2, f"▁{word}": 3}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.add_special_tokens(["<s>"])
    mark_spaces(backend, prefix)
    assert backend.encode("<s>the cat").tokens == ["<s>", word]  # after a special token, too
    assert backend.encode(" the cat").tokens == [f"▁{word}"]  # a space of the text is kept
    assert backend.decode([2]) == "the cat"


@pytest.mark.parametrize("pre", [None, "poro-chat"])
def test_an_unknown_way_to_split_text_is_refused(pre, tokenizer, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", small_model(tokenizer), tokenizer, pre=pre)
    with pytest.raises(ValueError, match=rf"tokenizer\.ggml\.pre = {pre!r}; supported are default, gpt-2"):
        load_teacher(str(path))


def test_qwens_pattern_is_transformers_own():
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert SPLITS["qwen2"].pattern == PRETOKENIZE_REGEX


def test_a_tokenizer_beside_the_file_is_not_read(tokenizer, tmp_path, monkeypatch):
    ids = []
    for name in ("alone", "beside"):
        (tmp_path / name).mkdir()
        path = write_gguf(tmp_path / name / "model.gguf", small_model(tokenizer), tokenizer)
        if name == "beside":  # another model's
            state = json.loads(tokenizer.backend_tokenizer.to_str())
            state["added_tokens"] = []
            words = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
            state["model"]["vocab"] = {word: place for place, word in enumerate(reversed(words))}
            (tmp_path / name / "tokenizer.json").write_text(json.dumps(state))
        monkeypatch.setattr(teacher, "CACHE", tmp_path / f"{name}-cache")
        ids.append(load_teacher(str(path)).tokenizer("the cat 1234 then")["input_ids"])
    assert ids[0] == ids[1]


def test_a_second_end_token_also_ends_answers(tokenizer, tmp_path):
    extra = lambda out: out.add_eot_token_id(5)  # noqa: E731
    read = load_teacher(str(write_gguf(tmp_path / "m.gguf", small_model(tokenizer), tokenizer, extra=extra)))
    assert read.model.generation_config.eos_token_id == [tokenizer.eos_token_id, 5]


def test_tokens_without_an_embedding_are_not_in_the_tokenizer(tmp_path):
    tokenizer = small_tokenizer(("<|begin_of_text|>", "<|end_of_text|>"))  # transformers adds <|endoftext|>
    path = write_gguf(tmp_path / "model.gguf", small_model(tokenizer), tokenizer)
    read = load_teacher(str(path))
    assert len(read.tokenizer) == read.config.vocab_size == len(tokenizer)
    text = "the <|endoftext|> cat"
    assert max(read.tokenizer(text)["input_ids"]) < len(tokenizer)
    assert read.tokenizer.decode(read.tokenizer(text)["input_ids"]) == text
    read.tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(text)["input_ids"] == read.tokenizer(text)["input_ids"] and len(again) == len(tokenizer)


def test_a_broken_cache_entry_is_created_again_and_every_byte_of_the_file_names_it(tokenizer, tmp_path, capsys):
    model = small_model(tokenizer)
    path = write_gguf(tmp_path / "model.gguf", model, tokenizer)
    load_teacher(str(path))
    (entry,) = (tmp_path / "cache" / "gguf").glob("model-*")
    whole = (entry / "model.safetensors").read_bytes()
    for broken in ("model.safetensors", "config.json", "manifest.json", "tokenizer.json"):
        (entry / broken).unlink()
        assert_same(load_teacher(str(path)).model, model)
        assert "is broken" in capsys.readouterr().err
        assert (entry / "model.safetensors").read_bytes() == whole
    (entry / "model.safetensors").write_bytes(whole[:-8])
    assert_same(load_teacher(str(path)).model, model)
    # one weight in the middle, at the same size
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    load_teacher(str(path))
    assert len([*(tmp_path / "cache" / "gguf").glob("model-*")]) == 2


def test_large_models_are_written_in_shards(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FILE_BYTES", 40_000)
    monkeypatch.setattr(gguf_files, "PIECE", 100)
    model = small_model(tokenizer)
    assert_same(load_teacher(str(write_gguf(tmp_path / "model.gguf", model, tokenizer))).model, model)
    (entry,) = (tmp_path / "cache" / "gguf").glob("model-*")
    index = json.loads((entry / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3 and set(index["weight_map"]) == set(model.state_dict())
    assert index["metadata"]["total_size"] == sum(
        x.nbytes for file in entry.glob("*.safetensors") for x in load_file(file).values()
    )


def test_rows_of_q_and_k_come_back_from_neighbours():
    x = torch.arange(24.0).view(8, 3)
    neighbours = x.reshape(2, 2, 2, 3).transpose(1, 2).reshape(8, 3)
    assert torch.equal(halves_from_neighbours(neighbours, 2), x)
