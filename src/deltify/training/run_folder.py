"""The folder of a run: whether a recipe may resume the run in it, and what the run was made from and on."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import yaml

from ..config import STAGES, Recipe, load_recipe, write_recipe
from ..utils.files import write_text
from .distributed import sole_writer

LOCK = ".run.lock"  # of the process that trains in the folder
IN_USE = "Another process trains in {}. Wait for it, or use another --name"
LEARNING_RATES = ("lr_mixers", "lr_other", "min_lr_ratio", "warmup_ratio", "max_grad_norm")
# these change rounding only
MEMORY = ("micro_batch_size", "activation_checkpointing")


def check_run(recipe: Recipe, resume: bool, device: torch.device, precision: str) -> list[str]:
    """Return one line for each difference from the run that the recipe's folder holds. Write nothing.

    A folder without a model or checkpoint holds no run, whatever a failed attempt has left there.

    Raises:
        FileExistsError: If the folder holds a run and `resume` is false.
        ValueError: If that run has another recipe. The message names the fields that differ.
    """
    folder = recipe.folder
    if not holds_run(folder):
        return []
    if not resume:
        raise FileExistsError(
            f"{folder} already holds a run. Add --resume to continue it, or --name to start another one"
        )
    old, new = flatten(asdict(load_recipe(folder / "recipe.yaml"))), flatten(asdict(recipe))
    changed = [key for key in new if not same(old.get(key), new[key]) and not key.startswith(("run.", "output"))]
    if refused := [key for key in changed if not may_change(key, old.get(key), new[key])]:
        changes = ", ".join(f"{key}: {old.get(key)!r} then, {new[key]!r} now" for key in refused)
        raise ValueError(
            f"{folder} was created by another recipe ({changes}). Use another --name, or restore the old values. When "
            f"resuming, only teacher.cache and a stage's {', '.join(LEARNING_RATES + MEMORY)} may change, and lr_other "
            "may not become or leave 0"
        )
    lines = [f"{key}: {old[key]!r} before, {new[key]!r} from now on" for key in changed]
    now = machine(device, precision)
    then = {name: read_run(folder).get(name, value) for name, value in now.items()}
    if then != now:
        described = [f"{how['device']} in {how['precision']}" for how in (then, now)]
        lines.append(
            f"warning: the run was on {described[0]} and continues on {described[1]}. Its results will not equal those "
            "of an unbroken run"
        )
    return lines


def same(old: object, new: object) -> bool:
    """Return whether two values of a field are the same. Sources are drawn by their number, so their order counts."""
    return old == new and (not isinstance(old, dict) or not isinstance(new, dict) or list(old) == list(new))


def may_change(key: str, old: object, new: object) -> bool:
    """Return whether a resumed run may have another value of this field."""
    if key == "teacher.cache":  # differs by rounding only
        return True
    stage, _, field = key.partition(".")
    if stage not in STAGES or field not in LEARNING_RATES + MEMORY:
        return False
    return field != "lr_other" or bool(old) == bool(new)  # with 0 the optimizer has fewer parameters


def holds_run(folder: Path) -> bool:
    """Return whether a folder holds a recipe and a model or checkpoint."""
    made = [*folder.glob("*/config.json"), *folder.glob("checkpoints/*/progress.json")]
    return (folder / "recipe.yaml").is_file() and bool(made)


def check_data(recipe: Recipe, data: dict[str, str]) -> None:
    """Raise ValueError if the tokens changed since the run began. `data` has their checksums."""
    then = read_run(recipe.folder).get("data", data) if holds_run(recipe.folder) else data
    if changed := [name for name in data if then.get(name) != data[name]]:
        raise ValueError(
            f"the tokens of {', '.join(changed)} are not those that {recipe.folder} began with. Restore the text, "
            f"{recipe.data.folder} and run.heldout_tokens, or use another --name"
        )


def remove_trial(folder: Path) -> None:
    """Empty the folder of an earlier --smoke, whose teacher is random. Leave any other folder as it is.

    Raises:
        ValueError: If a process trains in it.
    """
    path = folder / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not str(recipe.get("teacher", {}).get("model", "")).startswith("random:"):
        return
    with sole_writer(folder / LOCK, IN_USE.format(folder)):
        for entry in sorted(folder.iterdir(), key=lambda entry: entry == path):  # what says that it is a trial, last
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()


def check_weights(recipe: Recipe, weights: str, whose: str) -> None:
    """Raise ValueError if the fingerprint `weights` is not that of the teacher that the run began with."""
    then = read_run(recipe.folder).get("weights", weights) if holds_run(recipe.folder) else weights
    if then != weights:
        raise ValueError(
            f"{whose} has other weights (fingerprint {weights}) than the teacher that {recipe.folder} began with "
            f"({then}). Restore that teacher, or use another --name"
        )


def read_run(folder: Path) -> dict:
    """Return the contents of run.json, or an empty dictionary if there is none."""
    return json.loads((folder / "run.json").read_text()) if (folder / "run.json").is_file() else {}


def write_run(
    recipe: Recipe, device: torch.device, precision: str, data: dict[str, str], weights: str, start: dict[str, int]
) -> None:
    """Write recipe.yaml and run.json: device, precision, name and memory of a GPU, checksums of text and teacher.

    Args:
        data: Checksums of the tokens of each source.
        weights: Fingerprint of the teacher's weights.
        start: What the model of student.init was trained on before, as its run may go on later, or be deleted.
    """
    recipe.folder.mkdir(parents=True, exist_ok=True)
    made = machine(device, precision) | {"data": data, "weights": weights, "start": start}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        made |= {"gpu": gpu.name, "gpu_memory_bytes": gpu.total_memory}
    write_text(recipe.folder / "run.json", json.dumps(made))
    write_recipe(recipe, recipe.folder / "recipe.yaml")


def machine(device: torch.device, precision: str) -> dict[str, str]:
    """Return the facts about the machine that results depend on."""
    return {"device": device.type, "precision": precision}


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    """Return the fields of a nested recipe by their dotted names."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and key not in ("train", "data_weights")
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
