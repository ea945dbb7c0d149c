"""README and documentation: they build without warnings, their commands parse, and their Python runs."""

import contextlib
import io
import json
import logging
import re
import shlex
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import yaml

import deltify
from deltify.cli import COMMANDS, RECIPE_COMMANDS, main, make_parser
from deltify.config import RENAMED, RULES, STAGE_RULES, STAGES, Recipe, load_recipe, smoke
from deltify.recipes import find_recipe, recipe_names
from deltify.schema import CHOICES, STAGE_CHOICES, choices_of, recipe_schema, sections

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = [find_recipe(name) for name in recipe_names()]


def test_site_builds_strictly(tmp_path, monkeypatch, caplog):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]'")
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install -e '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: pip install -e '.[docs]'")
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    with caplog.at_level(logging.WARNING, logger="mkdocs"):
        config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path))
        build(config)  # raises Abort after a warning
    fields_page = (tmp_path / "reference/recipe/index.html").read_text()
    assert all(name in fields_page for name in ("retrieval_heads", "activation_checkpointing", "eval_every"))
    commands_page = (tmp_path / "reference/cli/index.html").read_text()
    assert all(f"deltify {name}" in commands_page for name in COMMANDS)
    python_page = (tmp_path / "reference/python/index.html").read_text()
    assert all(f'id="deltify.{name}"' in python_page for name in deltify.__all__ if not name.startswith("_"))


def commands_of(page: Path) -> list[str]:
    """Return every line of a page's code blocks that calls `deltify`, without its comment."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^ +((?:\.venv/bin/)?deltify .*)$", text, re.MULTILINE)
    return [line.split("  #")[0].split(" # ")[0] for line in lines if "deltify COMMAND" not in line]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_parses(page):
    parser = make_parser()
    for command in commands_of(page):
        arguments = shlex.split(command)[1:]
        complaint = io.StringIO()
        try:
            with contextlib.redirect_stderr(complaint):
                options, extra = parser.parse_known_args(arguments)
        except SystemExit:
            pytest.fail(f"{page.name}: {command}\n{complaint.getvalue()}")
        assert not extra or options.command in RECIPE_COMMANDS, f"{command}: {extra}"
        if options.command in RECIPE_COMMANDS:
            overrides = [part for part in extra if part.startswith("--")]
            assert all(is_field(name[2:]) for name in overrides), f"{command}: {overrides}"
            own = options.recipe.endswith(".yaml")  # a file of the reader
            assert own or options.recipe in recipe_names(), f"{command}: no such recipe"


def is_field(name: str) -> bool:
    cls: type = Recipe
    for part in name.split("."):
        if not is_dataclass(cls) or part not in (known := {f.name: f.type for f in fields(cls)}):
            return False
        cls = known[part]
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_of_the_repository(page):
    """Check links as GitHub follows them, where no page is generated."""
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("name", ["needles.png", "positions.png"])
def test_figures_of_the_results_page_are_those_of_the_report(name):
    source, copy = ROOT / "results/smollm2-135m" / name, ROOT / "docs/assets" / name
    assert copy.read_bytes() == source.read_bytes(), f"cp {source} {copy}"


def test_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    def load_small(path: str, overrides: list[str]) -> Recipe:
        assert overrides == ["--name", "mine"]
        recipe = load_recipe(path, [*overrides, "--output", str(tmp_path)])
        return replace(small := smoke(recipe), data=replace(small.data, folder=str(tmp_path / "data")))

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.setattr(deltify, "load_recipe", load_small)
    exec(compile(code, "README.md", "exec"), {})
    assert "To open a file" in capsys.readouterr().out


def test_schema_is_printed_and_names_every_field(capsys):
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == recipe_schema() and schema["required"] == ["name"]
    assert set(schema["properties"]) == {f.name for f in fields(Recipe)}
    for name, section in schema["properties"].items():
        assert section["description"], name
        for field, value in section.get("properties", {}).items():
            assert is_field(f"{name}.{field}") and value["description"], f"{name}.{field}"
    documented = [field.name for _, _, found in sections() for field in found]
    assert all(new.rpartition(".")[2] in documented for new in RENAMED.values())


def test_schema_allows_what_the_recipe_check_allows():
    for name in [*RULES, *(f"{stage}.{field}" for stage in STAGES for field in STAGE_RULES)]:
        good, _ = RULES.get(name) or STAGE_RULES[name.rpartition(".")[2]]
        if choices := choices_of(name):
            assert all(good(choice) for choice in choices) and not good("another"), name
    assert set(CHOICES) <= set(RULES) and set(STAGE_CHOICES) <= set(STAGE_RULES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_fit_the_schema(path):
    recipe, schema = yaml.safe_load(path.read_text()), recipe_schema()
    for name, value in recipe.items():
        assert name in schema["properties"]
        section = schema["properties"][name].get("properties")
        assert section is None or set(value) <= set(section), name
    try:
        import jsonschema
    except ImportError:
        return  # the names were compared
    jsonschema.validate(recipe, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(recipe | {"match": {"batch": 4}}, schema)


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"deltify {deltify.__version__}\n"
    if deltify.__version__ == "unknown":
        pytest.skip("deltify is not installed, so its version is unknown")
    assert f'version = "{deltify.__version__}"' in (ROOT / "pyproject.toml").read_text()
