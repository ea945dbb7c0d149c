"""Where a model is: in a folder of its own, in a run, or on the hub."""

from pathlib import Path

from ..config import STAGES


def model_folder(path: str) -> str:
    """The model in a folder: itself, or of a run the furthest stage. A hub id stays as it is."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if path.count("/") > 1 or path.startswith((".", "/", "~")):
            raise FileNotFoundError(f"there is no folder {path}")
        return path
    if (folder / "config.json").is_file():
        return str(folder)
    for name in (*reversed(STAGES), "converted"):
        if (folder / name / "config.json").is_file():
            return str(folder / name)
    raise FileNotFoundError(
        f"{path} holds neither a model (config.json) nor a run (converted/, align/, match/, extend/)"
    )
