"""Samples at validations: their prompts, their text, and that they do not change training."""

import json
from dataclasses import replace

import numpy as np
import torch
from helpers import assert_same_weights, random_student, records, tiny_recipe

from deltify import distill
from deltify.conversion.teacher import byte_tokenizer
from deltify.data.token_files import TokenFile
from deltify.training import samples
from deltify.training.samples import PROMPT_TOKENS, greedy_tokens, heldout_prompts, write_samples


def token_file(*lengths: int, first: int = 0) -> TokenFile:
    """Return documents of these lengths whose tokens count from `first`."""
    return TokenFile(np.arange(first, first + sum(lengths)), np.cumsum([0, *lengths]))


def test_prompts_are_beginnings_of_long_documents_of_every_text():
    short, long = PROMPT_TOKENS, PROMPT_TOKENS + 1
    prompts = heldout_prompts([token_file(short, long, short, *[long] * 9), token_file(long, first=1000)])
    assert prompts[:, 0].tolist() == [short, 1000, 2 * short + long, 2 * short + 2 * long]
    assert prompts[0].tolist() == list(range(short, short + PROMPT_TOKENS))
    assert heldout_prompts([token_file(short)]).shape == (0, PROMPT_TOKENS)


def test_greedy_tokens_are_those_of_generate():
    model = random_student("KAS", sliding_window=8, sink_tokens=2)
    prompts = torch.randint(model.config.vocab_size, (3, 20))
    ones = torch.ones_like(prompts)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = model.generate(prompts, attention_mask=ones, **settings)[:, 20:]
    model.generation_config.repetition_penalty = 5.0  # the model's settings are not used
    assert greedy_tokens(model, prompts, 12).tolist() == want.tolist()


def test_a_sample_ends_before_the_end_of_its_document_and_between_characters(monkeypatch):
    tokenizer = byte_tokenizer()
    text = tokenizer("A caf\u00e9, and", add_special_tokens=False)["input_ids"]
    cut = text.index(tokenizer("\u00e9", add_special_tokens=False)["input_ids"][0]) + 1  # half of the character
    rest = text[cut:]
    new = torch.tensor([[*rest, tokenizer.eos_token_id, *rest]])
    monkeypatch.setattr(samples, "greedy_tokens", lambda *_: new)
    sample = {"prompt": "A caf", "continuation": "\u00e9, and"}
    assert write_samples(None, torch.tensor([text[:cut]]), tokenizer) == [sample]


def test_every_validation_writes_samples_that_do_not_change_training(tmp_path, monkeypatch, whole):
    lines = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    validations = [(r["stage"], r["step"], r["tokens"]) for r in records(whole) if "heldout_kl" in r]
    assert [(r["stage"], r["step"], r["tokens"]) for r in lines] == [("teacher", 0, 0), *validations]
    assert len({tuple(sample["prompt"] for sample in line["samples"]) for line in lines}) == 1
    assert all(len(line["samples"]) == 4 for line in lines)
    monkeypatch.setattr(samples, "PROMPTS", 0)
    recipe = tiny_recipe(tmp_path)
    run = distill(replace(recipe, data=replace(recipe.data, folder=str(whole.parent / "data"))))
    assert not (run / "samples.jsonl").exists()
    assert_same_weights(run, whole, "converted", "align", "match")
