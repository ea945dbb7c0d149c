"""Find a model in its own folder, in a run, or on the hub."""

import difflib
import functools
import logging
from pathlib import Path

import yaml

from ..config import STAGES

logger = logging.getLogger(__name__)


def model_folder(path: str) -> str:
    """Return the folder of the model at a path: the path itself, or a run's last stage. A hub id is returned unchanged.

    Raises:
        FileNotFoundError: If there is no model, and `path` is no hub id.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if path.count("/") > 1 or path.startswith((".", "/", "~", "runs/")):  # recipes write to runs
            near = difflib.get_close_matches(folder.name, names_in(folder.parent), n=1)
            hint = f". Is it {folder.parent / near[0]}?" if near else ""
            raise FileNotFoundError(f"there is no folder {path}{hint}")
        return path
    if (folder / "config.json").is_file():
        return str(folder)
    if stages := saved_stages(folder):
        warn_of_unfinished_stages(folder, stages[-1])
        return str(folder / stages[-1])
    raise FileNotFoundError(
        f"{path} holds neither a model (config.json) nor a run (converted/, align/, match/, extend/)"
    )


def names_in(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, if it is one."""
    return [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


@functools.cache
def warn_of_unfinished_stages(run: Path, last: str) -> None:
    """Log once that a run's recipe has stages after the one whose model is taken."""
    if not (run / "recipe.yaml").is_file():
        return
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    planned = [name for name in STAGES if (recipe.get(name) or {}).get("tokens")]
    later = planned[planned.index(last) + 1 :] if last in planned else planned
    if later:
        names, verb = " and ".join(later), "are" if later[1:] else "is"
        logger.warning(f"{run}: {names} {verb} not finished. The model is that of {last}")


def saved_stages(run: Path) -> list[str]:
    """Return the stages of a run that have saved a model, in their order. The first one is "converted"."""
    return [name for name in ("converted", *STAGES) if (run / name / "config.json").is_file()]


def recipe_folder(source: str) -> Path | None:
    """Return the folder of the run that `source` is, or is a stage of. None if it is neither."""
    path = Path(source).expanduser()
    folders = (path, path.parent) if path.is_dir() else ()
    return next((folder for folder in folders if (folder / "recipe.yaml").is_file()), None)
