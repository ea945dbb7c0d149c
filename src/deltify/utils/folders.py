"""Find a model in its own folder, in a run, or on the hub."""

from pathlib import Path

from ..config import STAGES


def model_folder(path: str) -> str:
    """Return the folder of the model at a path: the path itself, or a run's last stage. A hub id is returned unchanged.

    Raises:
        FileNotFoundError: If there is no model.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if path.count("/") > 1 or path.startswith((".", "/", "~", "runs/")):  # recipes write to runs
            raise FileNotFoundError(f"there is no folder {path}")
        return path
    if (folder / "config.json").is_file():
        return str(folder)
    if stages := saved_stages(folder):
        return str(folder / stages[-1])
    raise FileNotFoundError(
        f"{path} holds neither a model (config.json) nor a run (converted/, align/, match/, extend/)"
    )


def saved_stages(run: Path) -> list[str]:
    """Return the stages of a run that have saved a model, in their order. The first one is "converted"."""
    return [name for name in ("converted", *STAGES) if (run / name / "config.json").is_file()]


def recipe_folder(source: str) -> Path | None:
    """Return the folder of the run that `source` is, or is a stage of. None if it is neither."""
    path = Path(source).expanduser()
    folders = (path, path.parent) if path.is_dir() else ()
    return next((folder for folder in folders if (folder / "recipe.yaml").is_file()), None)
