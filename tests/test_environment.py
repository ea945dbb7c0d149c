"""`deltify env`: versions, devices and kernels for bug reports."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
import yaml

from deltify import environment
from deltify.cli import main
from deltify.ops import dispatch

ROOT = Path(__file__).parent.parent


def test_versions_devices_and_kernels_are_printed(capsys, monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("transformers", "no-such-package"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"deltify {environment.package_version('deltify')}")
    assert f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}" in lines
    assert f"transformers {transformers.__version__}" in lines and "no-such-package not installed" in lines
    assert any(line.startswith("device cpu: ") and line.endswith(" GiB") for line in lines)
    assert lines[-1] == "kernels on cpu: plain PyTorch"


def test_a_gpu_has_a_line_for_itself_and_each_part_of_the_kernels(monkeypatch):
    gpu = SimpleNamespace(name="Some GPU", total_memory=80 * 2**30, major=9, minor=0)
    kernels = SimpleNamespace(
        CHECKS=("forward", "backward", "step"),
        KERNELS="DELTIFY_KERNELS",
        WIDTHS=(64, 128),
        failure=lambda index, part, width: "wrong results" if (part, width) == ("step", 128) else None,
        cuda_refusal=lambda index, width, gradients: "they need compute capability 9.0" if gradients else None,
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(dispatch, "triton_kernels", lambda: kernels)
    lines = environment.environment()
    assert "device cuda:0: Some GPU, 80.0 GiB, compute capability 9.0" in lines
    assert "auto means device cuda, precision bf16" in lines
    assert lines[-5:] == [
        "kernels on cuda:0, forward: Triton",
        "kernels on cuda:0, backward: Triton",
        "kernels on cuda:0, step: plain PyTorch: wrong results",
        "kernels on cuda:0, forward pass of the KDA operator: CUDA C++",
        "kernels on cuda:0, backward pass of the KDA operator: Triton: they need compute capability 9.0",
    ]
    monkeypatch.setenv("DELTIFY_KERNELS", "triton")
    line = "kernels on cuda:0, backward pass of the KDA operator: Triton: DELTIFY_KERNELS=triton"
    assert environment.environment()[-1] == line
    monkeypatch.setattr(dispatch, "triton_kernels", lambda: None)
    assert environment.environment()[-1] == "kernels on cuda:0, all: plain PyTorch: Triton is not installed"


def test_the_commit_is_that_of_the_code_that_runs(monkeypatch):
    origin = '{"url": "https://example.org/deltify", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}}'
    found = SimpleNamespace(read_text=lambda name: origin)
    monkeypatch.setattr(environment.Distribution, "from_name", lambda name: found)

    def no_repository(folder, *arguments):
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(environment, "git", no_repository)
    assert environment.source_commit() == "c0ffee"
    answers = {"ls-files": "", "describe": "abc-dirty"}
    monkeypatch.setattr(environment, "git", lambda folder, *arguments: answers[arguments[0]])
    assert environment.source_commit() == "abc-dirty"


def test_the_issue_template_asks_for_it():
    template = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    fields = {field["id"]: field for field in template["body"]}
    assert "deltify env" in fields["env"]["attributes"]["label"] and fields["env"]["validations"]["required"]
