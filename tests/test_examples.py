"""Examples: the notebook runs in its smoke form, launch files are well-formed, and Slurm jobs are queued again."""

import ast
import json
import os
import re
import subprocess
from pathlib import Path

import gguf
import pytest
import torch
import yaml
from helpers import records, small_model, small_tokenizer

from deltify.training.checkpoint import save_model
from deltify.utils.devices import pick_precision

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
LAUNCH = EXAMPLES / "launch"


def test_the_notebook_runs_in_its_smoke_form(tmp_path, monkeypatch, capsys):
    tokenizer = small_tokenizer()
    save_model(tmp_path / "teacher", small_model(tokenizer), tokenizer)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DELTIFY_SMOKE", str(tmp_path / "teacher"))

    names: dict = {}
    for number, cell in enumerate(json.loads((EXAMPLES / "colab.ipynb").read_text())["cells"]):
        if cell["cell_type"] == "code":
            code = "".join(line for line in cell["source"] if not line.startswith("%pip"))
            exec(compile(code, f"cell {number}", "exec"), names)
    run = names["run"]
    assert {row["stage"] for row in records(run)} == {"converted", "align", "match"}
    assert (run / "report.html").is_file() and json.loads((run / "results.json").read_text())["needles"]
    output = capsys.readouterr().out
    assert "Samples of match" in output and "No model finds a needle in" in output  # the teacher is random
    assert gguf.GGUFReader(tmp_path / "notebook-f16.gguf").tensors


def test_gpus_that_emulate_bfloat16_train_in_float32(monkeypatch):
    """So does the T4 of free notebooks."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert pick_precision("auto", torch.device("cuda")) == "fp32"


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_launch_files_are_well_formed(path):
    text = path.read_text()
    if path.suffix in (".sh", ".sbatch"):
        subprocess.run(["bash", "-n", path], check=True)
    elif path.suffix == ".py":
        ast.parse(text)
    else:
        content = yaml.safe_load(text)
        subprocess.run(["bash", "-n"], input=content.get("run", ""), text=True, check=True)
    assert "--resume" in text or "resume=True" in text  # so that a job that starts again continues


@pytest.mark.parametrize("code", [0, 1, 143])
def test_a_slurm_job_is_queued_again_after_sigterm_only(code, tmp_path):
    stand_ins = {
        "srun": f'echo "$@" >{tmp_path}/srun.log; exit {code}',
        "scontrol": f'[ "$1" = show ] && echo node1 || echo "$@" >{tmp_path}/requeued',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]"}
    done = subprocess.run(["bash", LAUNCH / "slurm.sbatch", "recipe.yaml", "--name", "a b"], env=os.environ | job)
    assert done.returncode == code and "recipe.yaml --name a b --resume" in (tmp_path / "srun.log").read_text()
    requeued = tmp_path / "requeued"
    assert requeued.is_file() == (code == 143) and (code != 143 or requeued.read_text() == "requeue 7\n")


def test_the_image_copies_what_the_context_has():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines  # nothing else is sent
    text = (ROOT / "docker" / "Dockerfile").read_text()
    copied = [name for names in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in names.split()]
    assert copied and sorted(copied) == sorted(line[1:] for line in lines if line.startswith("!"))
    assert all((ROOT / name).exists() for name in copied)
