"""Write the script with which a shell completes commands, options, recipe fields and recipe names."""

import argparse

from .recipes import recipe_names
from .schema import sections

BASH = """\
_deltify_recipes() {{
  compgen -W "{names}" -- "$1"
  compgen -f -- "$1"
}}"""
ZSH = """\
_deltify_recipes() {{
  _alternative 'recipes:recipe:({names})' 'files:file:_files'
}}"""
RECIPES = {"bash": "_deltify_recipes", "zsh": "_deltify_recipes"}


def completion_script(parser: argparse.ArgumentParser, recipe_commands: tuple[str, ...], shell: str) -> str:
    """Return the completion script of a parser.

    Args:
        parser: Parser of all commands.
        recipe_commands: Commands whose first argument is a recipe, and whose options include the recipe's fields.
        shell: bash or zsh.

    Raises:
        ValueError: If shtab is not installed.
    """
    try:
        import shtab
    except ImportError:
        raise ValueError("completion needs shtab. Run: pip install shtab") from None
    commands = next(a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in commands.items():
        for action in command._actions:
            if action.dest == "recipe" or (name, action.dest) == ("recipes", "name"):
                action.complete = RECIPES
            elif not action.choices and action.nargs != 0:
                action.complete = shtab.FILE
        if name in recipe_commands:
            for flag in field_flags():
                if flag not in command._option_string_actions:  # capture has an --output of its own
                    command.add_argument(flag)
    preamble = {"bash": BASH, "zsh": ZSH}[shell].format(names=" ".join(recipe_names()))
    return shtab.complete(parser, shell, preamble=preamble)


def field_flags() -> list[str]:
    """Return the options that set a field of a recipe, such as --match.tokens."""
    flags = []
    for section, _, fields in sections():
        for name in section.split(", ") if section else [""]:
            flags += [f"--{name}.{field.name}" if name else f"--{field.name}" for field in fields]
    return flags
