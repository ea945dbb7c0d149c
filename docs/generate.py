"""mkdocs hook: write the reference pages from the code, and add pages from outside docs/."""

import argparse
import ast
import json
from dataclasses import MISSING
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from deltify.cli import COMMANDS, make_parser
from deltify.schema import FieldInfo, choices_of, recipe_schema, renamed_fields, sections, type_name

ROOT = Path(__file__).resolve().parent.parent
COPIED = {
    "project/changelog.md": "CHANGELOG.md",
    "project/contributing.md": "CONTRIBUTING.md",
}
API_INTRO = """# Python API

After `import deltify`, the names on this page are attributes of `deltify`. They are the public interface, whose
changes follow the rules in [Contributing](../project/contributing.md#versions-and-what-is-public). Everything else may
change in any version.
"""
COMMAND_INTRO = """# Command line

`deltify --version` prints the version. `deltify COMMAND --help` prints the options of a command."""
RECIPE_INTRO = """# Recipe fields

A recipe is a YAML file with the fields below. Each field is also a flag of the commands that take a recipe:
`match.tokens` is `--match.tokens`. An unknown field is an error that names the nearest known one.

With the [JSON Schema](recipe.schema.json) of recipes, an editor can check and complete them. `deltify schema` prints
the schema. In VS Code with the YAML extension, save it as `recipe.schema.json` beside the recipe, and begin the recipe
with this line:

```yaml
# yaml-language-server: $schema=recipe.schema.json
```"""
RENAMED_INTRO = """
## Renamed fields

Recipes written before version 0.1 have other names for some fields. deltify refuses an old name with an error that
gives the new one.

| old | new |
|---|---|"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    for name, source in COPIED.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    pages = {
        "reference/cli.md": command_line(),
        "reference/recipe.md": recipe_fields(),
        "reference/python.md": python_api(),
        "reference/recipe.schema.json": json.dumps(recipe_schema(), indent=2),
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def command_line() -> str:
    """Return the page of all commands, from their parsers."""
    parser = make_parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    summaries = {choice.dest: choice.help for choice in commands._choices_actions}
    lines = [COMMAND_INTRO]
    for name in COMMANDS:
        command = commands.choices[name]
        command.prog, command.epilog = f"deltify {name}", None
        lines += ["", f"## deltify {name}", "", f"{summaries[name][0].upper()}{summaries[name][1:]}.", ""]
        lines += ["```text", command.format_usage().strip(), "```", ""]
        rows = [action for action in command._actions if action.dest != "help" and action.help != argparse.SUPPRESS]
        if rows:
            lines += ["| argument | meaning |", "|---|---|"]
        for action in rows:
            shown = ", ".join(action.option_strings) or action.metavar or action.dest
            lines.append(f"| `{shown}` | {cell(action.help or '')} |")
        if name in ("distill", "convert", "plan", "capture"):
            lines += ["", "Every [field of the recipe](recipe.md) is also a flag, such as `--match.tokens 1000000`."]
    return "\n".join(lines) + "\n"


def recipe_fields() -> str:
    """Return the page of all recipe fields, from the dataclasses."""
    lines = [RECIPE_INTRO]
    for name, summary, fields in sections():
        title = " and ".join(f"`{part}`" for part in name.split(", ")) if name else "Top level"
        lines += ["", f"## {title}", "", summary, "", "| field | type | default | meaning |", "|---|---|---|---|"]
        lines += [field_row(name.split(", ")[0], field) for field in fields]
    lines += [RENAMED_INTRO]
    lines += [f"| `{old}` | `{new}` |" for old, new in renamed_fields().items()]
    return "\n".join(lines) + "\n"


def field_row(section: str, field: FieldInfo) -> str:
    default = "required" if field.default is MISSING else f"`{json.dumps(field.default)}`"
    kind = type_name(field.type)
    if choices := choices_of(f"{section}.{field.name}"):
        kind = "one of " + ", ".join(f"`{choice}`" for choice in choices)
    return f"| `{field.name}` | {cell(kind)} | {cell(default)} | {cell(field.description)} |"


def python_api() -> str:
    """Return the page of the public names: those in `__all__` of the package, functions first."""
    tree = ast.parse((ROOT / "src/deltify/__init__.py").read_text())
    names = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    )
    names = sorted((name for name in names if not name.startswith("_")), key=lambda name: (name[0].isupper(), name))
    return API_INTRO + "\n" + "\n\n".join(f"::: deltify.{name}" for name in names) + "\n"
