"""A run's folder and machine: what a recipe may go on with, and the device and precision that its numbers come from."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from ..config import STAGES, Recipe, load_recipe, write_recipe
from ..utils.files import write_text

RATES = ("lr_mixers", "lr_other", "min_lr_ratio", "warmup_ratio", "max_grad_norm")
MEMORY = (
    "micro_batch_size",
    "activation_checkpointing",
)  # the same training, but for rounding; align scales by micro-batch


def check_run(recipe: Recipe, resume: bool, device: torch.device, precision: str) -> list[str]:
    """What differs from the run that the recipe's folder holds, a line each; nothing is written.

    A folder without a model or checkpoint holds no run yet, whatever an attempt that failed has left there.

    Raises:
        FileExistsError: if the folder holds a run and `resume` was not asked for.
        ValueError: if the run there was made from another recipe; names the fields that differ.
    """
    folder = recipe.folder
    if not holds_run(folder):
        return []
    if not resume:
        raise FileExistsError(f"{folder} holds a run already; add --resume to go on with it, or --name for another one")
    old, new = flatten(asdict(load_recipe(folder / "recipe.yaml"))), flatten(asdict(recipe))
    changed = [key for key in new if old.get(key) != new[key] and not key.startswith(("run.", "output"))]
    if refused := [key for key in changed if not may_change(key, old.get(key), new[key])]:
        changes = ", ".join(f"{key}: {old.get(key)!r} then, {new[key]!r} now" for key in refused)
        raise ValueError(
            f"{folder} was made from another recipe ({changes}); use another --name, or give it as it was. Only a "
            f"stage's {', '.join(RATES + MEMORY)} and teacher.cache may change on the way, lr_other not to or from 0"
        )
    lines = [f"{key}: {old[key]!r} until now, {new[key]!r} from here on" for key in changed]
    now = machine(device, precision)
    then = {name: read_run(folder).get(name, value) for name, value in now.items()}
    if then != now:
        described = [f"{how['device']} in {how['precision']}" for how in (then, now)]
        lines.append(
            f"warning: the run was on {described[0]}, and goes on on {described[1]}; its numbers will not be equal to "
            "those of an unbroken run"
        )
    return lines


def may_change(key: str, old: object, new: object) -> bool:
    """Whether a run may go on with this field changed."""
    if key == "teacher.cache":  # the same teacher, but for rounding
        return True
    stage, _, field = key.partition(".")
    if stage not in STAGES or field not in RATES + MEMORY:
        return False
    return field != "lr_other" or bool(old) == bool(new)  # 0 freezes: the checkpoint's optimizer has other tensors


def holds_run(folder: Path) -> bool:
    made = [*folder.glob("*/config.json"), *folder.glob("checkpoints/*/progress.json")]
    return (folder / "recipe.yaml").is_file() and bool(made)


def check_data(recipe: Recipe, data: dict[str, str]) -> None:
    """Raises ValueError if the tokens, of which `data` has the checksums, are not those that the run began with."""
    then = read_run(recipe.folder).get("data", data) if holds_run(recipe.folder) else data
    if changed := [name for name in data if then.get(name) != data[name]]:
        raise ValueError(
            f"the tokens of {', '.join(changed)} are not those that {recipe.folder} began with; bring the text, "
            f"{recipe.data.folder} and run.heldout_tokens back as they were, or use another --name"
        )


def check_weights(recipe: Recipe, weights: str, whose: str) -> None:
    """Raises ValueError if weights, given by fingerprint, are not those of the teacher that the run began with."""
    then = read_run(recipe.folder).get("weights", weights) if holds_run(recipe.folder) else weights
    if then != weights:
        raise ValueError(
            f"{whose} has other weights (fingerprint {weights}) than the teacher that {recipe.folder} began with "
            f"({then}); bring that teacher back, or use another --name"
        )


def read_run(folder: Path) -> dict:
    """What run.json says; nothing if there is none."""
    return json.loads((folder / "run.json").read_text()) if (folder / "run.json").is_file() else {}


def write_run(recipe: Recipe, device: torch.device, precision: str, data: dict[str, str], weights: str) -> None:
    """Makes the run's folder, with what it is made from and on: a checksum of each source's tokens, and the fingerprint
    of the teacher's weights."""
    recipe.folder.mkdir(parents=True, exist_ok=True)
    made = machine(device, precision) | {"data": data, "weights": weights}
    write_text(recipe.folder / "run.json", json.dumps(made))
    write_recipe(recipe, recipe.folder / "recipe.yaml")


def machine(device: torch.device, precision: str) -> dict[str, str]:
    return {"device": device.type, "precision": precision}


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and key != "train"
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
