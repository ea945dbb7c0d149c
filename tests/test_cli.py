"""The command line: bad input, and what commands print."""

import re

import pytest
import torch
from helpers import tiny_recipe
from transformers import AutoModelForCausalLM

from deltify import cli, distill
from deltify.cli import main
from deltify.config import Stage, load_recipe, write_recipe
from deltify.training import distributed
from deltify.training.distributed import sole_writer


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["distill", "absent.yaml"], "there is no recipe absent.yaml"),
        (["distill", "{recipe}", "--match.tokns", "5"], "did you mean match.tokens?"),
        (["distill", "{recipe}", "--match.tokens", "many"], "many"),
        (["distill", "{recipe}", "--teacher.model", "gpt-nowhere"], "'gpt-nowhere' is not a folder"),
        (["distill", "{recipe}", "--data.train", '{"absent.txt": 1}'], "no text at 'absent.txt'"),
        (["distill", "{recipe}", "--run.report_to", "paper"], "run.report_to='paper'"),
        (["distill", "{recipe}", "--student.init", "cold"], "init='cold'"),
        (["distill", "{recipe}", "--run.device", "cuda:99"], "device 'cuda:99' is not there"),
        (["distill", "{recipe}", "--run.eval_every", "0"], "run.eval_every=0 must be at least 1"),
        (
            ["distill", "{recipe}", "--run.heldout_sequence_length", "1"],
            "run.heldout_sequence_length=1 must be at least 2",
        ),
        (["distill", "{recipe}", "--run.heldout_tokens", "8"], "run.heldout_tokens=8 must be at least run.heldout_seq"),
        (["distill", "{recipe}", "--data.max_tokens", "0"], "data.max_tokens=0 must be at least 1, or null"),
        (["distill", "{recipe}", "--match.tokens", "-640"], "match.tokens=-640 must be at least 0"),
        (["distill", "{recipe}", "--run.save_every", "-1"], "run.save_every=-1 must be at least 0"),
        (["distill", "{recipe}", "--run.save_every_minutes", "0"], "run.save_every_minutes=0.0 must be above 0"),
        (["distill", "{recipe}", "--align.max_grad_norm", "0"], "align.max_grad_norm=0.0 must be above 0"),
        (["generate", "{folder}", "Hello", "--device", "gpu"], "device 'gpu' is unknown; choose auto, cpu, cuda"),
        (["read", "{folder}", "a.txt", "-o", "b", "--device", "cuda:99"], "choose auto or cpu"),
        (["chat", "{folder}", "--device", "cuda:x"], "device 'cuda:x' is unknown"),
        (["serve", "{folder}", "--device", "gpu"], "device 'gpu' is unknown"),
        (["report", "absent"], "deltify evaluate absent"),
        (["evaluate", "{folder}", "--limit", "5"], "--limit does nothing without --tasks"),
        (["evaluate", "{folder}", "--needle-samples", "5"], "--needle-samples does nothing without --needles"),
        (["sample", "{folder}", "a", "-o", "b.jsonl", "--keep-number", "x"], "--keep-number does nothing without --ch"),
        (["sample", "{folder}", "a", "-o", "b.jsonl", "--chat", "--prompt-tokens", "9"], "nothing with --chat"),
        (["generate", "{folder}", "Hello"], "holds neither a model"),
    ],
)
def test_bad_input_is_named_on_the_command_line(arguments, message, tmp_path, capsys):
    write_recipe(tiny_recipe(tmp_path), tmp_path / "recipe.yaml")
    places = {"{recipe}": str(tmp_path / "recipe.yaml"), "{folder}": str(tmp_path)}
    filled = [places.get(argument, argument) for argument in arguments]
    assert main(filled) == 1
    assert message in capsys.readouterr().err


def test_a_mistyped_folder_is_corrected_and_a_hub_id_that_fails_is_called_no_folder(tmp_path, capsys, monkeypatch):
    (tmp_path / "smollm2").mkdir()
    assert main(["generate", f"{tmp_path}/smolm2", "Hello"]) == 1
    assert f"there is no folder {tmp_path}/smolm2" in (told := capsys.readouterr().err)
    assert told.endswith(f"Is it {tmp_path}/smollm2?\n")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", unreachable)
    for name in ("owner/model", "smolm2"):
        assert main(["generate", name, "Hello"]) == 1
        assert f"there is no folder {name}, and the hub does not give it: no connection\n" in capsys.readouterr().err


def unreachable(*_, **__):
    raise OSError("no connection\nlong explanation")


def test_a_trial_replaces_an_earlier_trial_and_nothing_else(tmp_path, capsys):
    write_recipe(recipe := tiny_recipe(tmp_path), tmp_path / "recipe.yaml")
    trial = ["convert", str(tmp_path / "recipe.yaml"), "--smoke"]
    assert main(trial) == 0 and main(trial) == 0
    folder = tmp_path / f"{recipe.name}-smoke"
    assert (folder / "converted" / "config.json").is_file()
    # a run of this name with a real teacher
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("random:llama", "owner/teacher"))
    assert main(trial) == 1 and "already holds a run" in capsys.readouterr().err
    (folder / "recipe.yaml").write_text(text)
    with sole_writer(folder / ".run.lock", ""):
        assert main(trial) == 1 and "Another process trains in" in capsys.readouterr().err
    assert (folder / "converted" / "config.json").is_file()


@pytest.mark.parametrize("gpus, used", [(8, 2), (3, 2), (2, 2), (1, None)])
def test_as_many_gpus_are_used_as_can_share_the_batches(gpus, used, monkeypatch, capsys):
    started = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(distributed.os, "execv", lambda program, arguments: started.append(arguments))
    distributed.relaunch_with_torchrun(load_recipe("smollm2-135m-kda"))  # extend has batches of 2 sequences
    assert [part for call in started for part in call if "nproc" in part] == [f"--nproc-per-node={used}"] * bool(used)
    assert (f"{used} of {gpus} GPUs are used" in capsys.readouterr().out) == (gpus > 2)


def test_stopped_sampling_is_not_continued(monkeypatch, capsys):
    def stop(options, extra):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "sample", (cli.COMMANDS["sample"][0], stop))
    assert main(["sample", "model", "text", "-o", "out.jsonl"]) == 130
    assert "Name another file to start anew" in capsys.readouterr().err


def test_generate_streams_and_counts(tmp_path, capsys):
    run = distill(tiny_recipe(tmp_path, match=Stage()))
    assert main(["generate", str(run), "Hello", "--max-new-tokens", "5", "--device", "cpu"]) == 0
    assert re.search(r"\[[1-5] tokens in [\d.]+ s, [\d.]+ tokens/s, prompt of 5 included\]", capsys.readouterr().out)


def test_a_full_gpu_is_an_error_of_one_line(capsys, monkeypatch):
    def fill(options, extra):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 56.08 GiB. GPU 0 has a total capacity of 139.80 GiB of which 44.23 "
            "GiB is free. Process 880 has 66.00 MiB memory in use."
        )

    monkeypatch.setitem(cli.COMMANDS, "recipes", (cli.COMMANDS["recipes"][0], fill))
    assert cli.main(["recipes"]) == 1
    told = capsys.readouterr().err
    assert told.startswith(
        "deltify: a GPU's memory is full (CUDA out of memory. Tried to allocate 56.08 GiB. GPU 0 has"
    )
    assert "44.23 GiB is free). Other programs may use it (nvidia-smi lists them), or" in told and told.count("\n") == 1
