"""What the models of a run were trained on."""

import json
from dataclasses import dataclass
from pathlib import Path

from ..config import STAGES, load_recipe
from ..utils.folders import recipe_folder, saved_stages
from .metrics import read_stages
from .run_folder import read_run


@dataclass(frozen=True)
class Trained:
    """Number of tokens that a model was trained on, and length in tokens of its longest training sequences."""

    tokens: int = 0
    length: int = 0


def trained_stages(run: Path) -> dict[str, Trained]:
    """Return what the model of each stage of a run was trained on, of "converted", too.

    It includes earlier stages, and the run or stage that this one started from (`student.init`). A stage that saved no
    model adds nothing.

    Raises:
        FileNotFoundError: If the run has not begun.
    """
    recipe = load_recipe(run / "recipe.yaml")
    start = read_run(run).get("start")
    # runs of earlier versions have not written down what they started from
    before = trained_model(recipe.student.init) if start is None else Trained(**start)
    lines, saved = dict(read_stages(run)), saved_stages(run)
    trained = {"converted": before}
    last = before
    for name in STAGES:
        if name in lines and name in saved:
            length = max(last.length, recipe.stage(name).sequence_length)
            last = Trained(before.tokens + saved_tokens(run / name, lines[name]), length)
        trained[name] = last
    return trained


def trained_model(source: str | Path) -> Trained:
    """Return what the model of a run, or of a stage's folder, was trained on. Of other models nothing is known."""
    if (run := recipe_folder(str(source))) is None:
        return Trained()
    stages, path = trained_stages(run), Path(source).expanduser()
    return stages[STAGES[-1]] if path == run else stages.get(path.name, Trained())


def saved_tokens(folder: Path, records: list[dict]) -> int:
    """Return the tokens at which a stage saved its model, of its lines in metrics.jsonl.

    A stage that stopped early may have gone on since, without saving its model again.
    """
    stopped = folder / "unfinished.json"
    step = json.loads(stopped.read_text())["step"] if stopped.is_file() else records[-1]["step"]
    return max(record["tokens"] for record in records if record["step"] <= step)
