"""`deltify init`: recipes that fit a teacher, a machine and a time, and refusals that say what would."""

import re

import pytest
from helpers import small_model, small_tokenizer, write_gguf
from transformers import GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from deltify.cli import main
from deltify.config import load_recipe
from deltify.recipes import summary
from deltify.training import estimate, first_recipe
from deltify.training.first_recipe import FULL, MEMORY, recipe_name

SMOLLM2 = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
SMOLLM2 |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
EIGHT_B = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
EIGHT_B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072}


@pytest.fixture
def smollm2(tmp_path):
    """A folder with the configuration of SmolLM2-135M, with a shorter context window."""
    return saved(tmp_path / "Small Model", LlamaConfig(**SMOLLM2, max_position_embeddings=1024))


def saved(folder, config):
    config.save_pretrained(folder)
    return folder


def planned(recipe, gpu):
    """Return the plans of a recipe, as `deltify plan` makes them."""
    return estimate.plan(recipe, gpu=gpu)


def test_a_recipe_for_a_gpu_fits_its_memory_and_the_time(smollm2, tmp_path, capsys):
    path = tmp_path / "my.yaml"
    assert main(["init", str(smollm2), "--gpu", "H200", "--hours", "2", "-o", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"deltify distill {path} --smoke" in said and "context window of 1,024 tokens" in said
    recipe = load_recipe(path)
    assert (recipe.name, recipe.teacher.architecture) == ("small-model-kda", "llama")
    assert (recipe.align.sequence_length, recipe.match.sequence_length, recipe.extend.tokens) == (512, 1024, 0)
    assert recipe.run.heldout_sequence_length == 1024
    assert recipe.match.lr_other == load_recipe("smollm2-135m-kda").match.lr_other
    plans = planned(recipe, "h200")
    hours = sum(plan.seconds * plan.stage.steps for plan in plans) / 3600
    assert 1.45 < hours <= 1.5 and all(plan.total < FULL * MEMORY["h200"] for plan in plans)
    assert recipe.data.max_tokens == recipe.align.tokens + recipe.match.tokens
    assert summary(path) == f"{smollm2} to KDA in all layers, in 2 hours on one h200."
    assert "not measured" not in said and "pip install -e '.[hub]'" in said


def test_every_written_field_is_read_back(smollm2, tmp_path):
    recipe, text = first_recipe.first_recipe(str(smollm2), gpu="a100", hours=0.5)
    (tmp_path / "my.yaml").write_text(text)
    assert load_recipe(tmp_path / "my.yaml") == recipe
    assert "hours come from the data sheet of a100 and were not measured" in text


def test_a_large_teacher_gets_stages_that_save_memory(tmp_path):
    teacher = saved(tmp_path / "eight", LlamaConfig(**EIGHT_B))
    with pytest.raises(ValueError, match=r"eight does not fit a100-40gb: .* needs \d+.*Shard it over [248] x h200"):
        first_recipe.first_recipe(str(teacher), gpu="a100-40gb", hours=24)
    three = saved(tmp_path / "three", LlamaConfig(**EIGHT_B | {"hidden_size": 2048, "intermediate_size": 8192}))
    recipe, text = first_recipe.first_recipe(str(three), gpu="h200", hours=24)
    assert recipe.extend.sequence_length == 32768 and not recipe.student.gate_bias
    assert recipe.match.micro_batch_size == 1 and recipe.match.activation_checkpointing
    assert "activation_checkpointing: true  # recomputes" in text
    with pytest.raises(ValueError, match=r"three does not fit rtx4090: .*Choose --gpu (\w+ or )*h200"):
        first_recipe.first_recipe(str(three), gpu="rtx4090", hours=24)


def test_a_teacher_of_one_to_two_billion_parameters_gets_the_rates_that_were_measured_at_its_size(tmp_path):
    teacher = saved(
        tmp_path / "qwen",
        Qwen2Config(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, tie_word_embeddings=True),
    )
    recipe, text = first_recipe.first_recipe(str(teacher), gpu="h200", hours=2)
    measured = load_recipe("qwen2.5-1.5b-kda")
    assert (recipe.match.lr_mixers, recipe.match.lr_other) == (measured.match.lr_mixers, measured.match.lr_other)
    assert recipe.data.train == measured.data.train and "qwen2.5-1.5b-kda" in text


@pytest.mark.parametrize("rate", [40e9, 100e9, 800e9])
def test_a_recipe_for_a_cpu_fits_the_measured_speed(rate, smollm2, monkeypatch):
    monkeypatch.setattr(first_recipe, "product_rate", lambda: rate)
    monkeypatch.setattr(first_recipe, "machine_memory", lambda: 16 * 2**30)
    recipe, text = first_recipe.first_recipe(str(smollm2), cpu=True, hours=1)
    assert recipe.data.train == {"python-docs": 1.0} and recipe.run.eval_every >= 12
    assert min(recipe.align.steps, recipe.match.steps) >= first_recipe.FEWEST_STEPS
    hours = [float(x) for x in re.findall(r"^# (?:convert|align|match) .* ([\d.]+)$", text, re.MULTILINE)]
    assert len(hours) == 3 and 0.4 < sum(hours) <= 0.76
    assert recipe.match.batch_size == (8 if rate > 50e9 else 4)
    assert "speed of this machine" in text and "pip install" not in text


def test_too_little_time_or_memory_is_refused_with_what_is_enough(smollm2, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(first_recipe, "product_rate", lambda: 25e9)
    monkeypatch.setattr(first_recipe, "machine_memory", lambda: 16 * 2**30)
    with pytest.raises(ValueError, match=r"--hours 0\.1 is too short on cpu\. .*Give --hours ([\d.]+)") as refused:
        first_recipe.first_recipe(str(smollm2), cpu=True, hours=0.1)
    enough = float(re.search(r"--hours ([\d.]+),", str(refused.value)).group(1))
    assert 0.1 < enough < 2 and first_recipe.first_recipe(str(smollm2), cpu=True, hours=enough)
    monkeypatch.setattr(first_recipe, "machine_memory", lambda: 2**30)
    with pytest.raises(ValueError, match=r"does not fit cpu: .*of 1\.0 GiB may be used\. Choose --gpu h100 or h200"):
        first_recipe.first_recipe(str(smollm2), cpu=True)
    with pytest.raises(ValueError, match=r"hours=0 must be above 0"):
        first_recipe.first_recipe(str(smollm2), cpu=True, hours=0)
    assert main(["init", str(smollm2), "--gpu", "abacus", "-o", str(tmp_path / "x.yaml")]) == 1
    assert "gpu='abacus' is unknown; choose one of h100, h200" in capsys.readouterr().err
    assert not (tmp_path / "x.yaml").exists()


def test_teachers_that_cannot_be_converted_or_found_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    other = saved(tmp_path / "gpt2", GPT2Config())
    with pytest.raises(ValueError, match="'gpt2' cannot be converted yet; supported are: arcee, llama"):
        first_recipe.first_recipe(str(other), gpu="h200")
    with pytest.raises(FileNotFoundError, match=r"'absent' is not a folder, a \.gguf file, a hub id"):
        first_recipe.first_recipe("absent", gpu="h200")
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' is not a folder, and could not be read from the hub"):
        first_recipe.first_recipe("nobody/nothing", gpu="h200")


def test_a_gguf_file_and_other_families_are_read_from_their_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = small_tokenizer()
    file = write_gguf(tmp_path / "Tiny.Q8_0.gguf", small_model(tokenizer), tokenizer)
    assert main(["init", str(file), "--gpu", "h100"]) == 0
    recipe = load_recipe("tiny.q8_0-kda.yaml")
    assert recipe.teacher.model == str(file) and recipe.teacher.architecture == "llama"
    text = (tmp_path / "tiny.q8_0-kda.yaml").read_text()
    assert "need heads of width 64 or 128, not 16" in text and "context window of 4,096 tokens" in text
    assert main(["init", str(file), "--gpu", "h100"]) == 1  # it exists
    qwen3 = saved(tmp_path / "qwen3", Qwen3Config(num_hidden_layers=4))
    assert first_recipe.first_recipe(str(qwen3), gpu="h100")[0].teacher.architecture == "qwen3"


def test_this_machines_gpu_is_found_by_its_name(monkeypatch):
    monkeypatch.setattr(first_recipe.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(first_recipe.torch.cuda, "get_device_name", lambda index: "NVIDIA A100-SXM4-40GB")
    properties = type("Properties", (), {"total_memory": 39 * 2**30})
    monkeypatch.setattr(first_recipe.torch.cuda, "get_device_properties", lambda index: properties)
    assert (machine := first_recipe.pick_machine(None, False)).name == "a100" and machine.memory == 39 * 2**30
    monkeypatch.setattr(first_recipe.torch.cuda, "get_device_name", lambda index: "Abacus 9000")
    with pytest.raises(ValueError, match=r"\(Abacus 9000\) is unknown\. Give the most similar of --gpu h100, h200"):
        first_recipe.pick_machine(None, False)


def test_names_of_runs_come_from_the_teachers():
    names = {
        "HuggingFaceTB/SmolLM2-135M": "smollm2-135m-kda",
        "a/My Model.Q8_0.gguf": "my-model.q8_0-kda",
        "x/": "x-kda",
    }
    assert {teacher: recipe_name(teacher) for teacher in names} == names
