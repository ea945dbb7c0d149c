"""Examples: the notebook runs in its smoke form, and launch files are well-formed."""

import json
import shutil
from pathlib import Path

import gguf
import torch
from helpers import records, small_model, small_tokenizer

from deltify.training.checkpoint import save_model
from deltify.utils.devices import pick_precision

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def test_the_notebook_runs_in_its_smoke_form(tmp_path, monkeypatch, capsys):
    tokenizer = small_tokenizer()
    save_model(tmp_path / "teacher", small_model(tokenizer), tokenizer)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DELTIFY_SMOKE", str(tmp_path / "teacher"))
    # until recipes are found by name
    folder = next(ROOT / path for path in ("recipes", "src/deltify/recipes") if (ROOT / path).is_dir())
    shutil.copy(folder / "smollm2-135m-demo.yaml", tmp_path / "smollm2-135m-demo")

    names: dict = {}
    for number, cell in enumerate(json.loads((EXAMPLES / "colab.ipynb").read_text())["cells"]):
        if cell["cell_type"] == "code":
            code = "".join(line for line in cell["source"] if not line.startswith("%pip"))
            exec(compile(code, f"cell {number}", "exec"), names)
    run = names["run"]
    assert {row["stage"] for row in records(run)} == {"converted", "align", "match"}
    assert (run / "report.html").is_file() and json.loads((run / "results.json").read_text())["needles"]
    output = capsys.readouterr().out
    assert "Samples of match" in output and "Needles found" in output
    assert gguf.GGUFReader(tmp_path / "notebook-f16.gguf").tensors


def test_gpus_that_emulate_bfloat16_train_in_float32(monkeypatch):
    """So does the T4 of free notebooks."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert pick_precision("auto", torch.device("cuda")) == "fp32"
