"""The recipes that come with deltify, found by name: the path of a file in this folder, without .yaml."""

from pathlib import Path

FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with deltify."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


def find_recipe(recipe: str | Path) -> Path:
    """Return the path of a recipe. A file that exists is preferred to a recipe of the same name.

    Args:
        recipe: Path of a YAML file, or name of a recipe that comes with deltify.

    Raises:
        FileNotFoundError: If there is neither. The message lists the names.
    """
    if Path(recipe).is_file():
        return Path(recipe)
    if str(recipe) in recipe_names():
        return FOLDER / f"{recipe}.yaml"
    known = ", ".join(recipe_names())
    raise FileNotFoundError(f"there is no recipe {recipe}. Give a YAML file, or a recipe of deltify: {known}")


def summary(name: str) -> str:
    """Return the first line of a recipe, a comment that says what it does."""
    return find_recipe(name).read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


def write_new(path: Path, text: str) -> None:
    """Write a file that does not exist yet.

    Raises:
        FileExistsError: If it exists.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise FileExistsError(f"{path} exists. Choose another file with --output") from None
