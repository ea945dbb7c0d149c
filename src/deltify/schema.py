"""Return the fields of recipes, read from the dataclasses in config.py: for the documentation and as JSON Schema."""

import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse

from .config import DATA_PARALLEL, DIVERGENCES, OPTIMIZERS, PRECISIONS, RENAMED, STAGES, Recipe

CHOICES = {"run.precision": PRECISIONS, "run.data_parallel": DATA_PARALLEL}
STAGE_CHOICES = {"divergence": DIVERGENCES, "optimizer": OPTIMIZERS}
JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


@dataclass(frozen=True)
class FieldInfo:
    """One field of a recipe.

    Args:
        name: Name of the field within its section.
        type: Type that its values must have.
        default: Value of the field where a recipe does not set it; MISSING if every recipe must.
        description: Text of the field's `Args:` entry.
    """

    name: str
    type: Any
    default: Any
    description: str


def describe(cls: type) -> tuple[str, list[FieldInfo]]:
    """Return the summary of a section's dataclass and its fields."""
    docstring = parse(cls.__doc__ or "")
    texts = {entry.arg_name: " ".join((entry.description or "").split()) for entry in docstring.params}
    hints = get_type_hints(cls)
    found = []
    for f in fields(cls):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        found.append(FieldInfo(f.name, hints[f.name], default, texts.get(f.name, "")))
    return docstring.short_description or "", found


def type_name(kind: Any) -> str:
    """Return a type as recipes' readers know it, such as `str | null`."""
    if isinstance(kind, types.UnionType) or get_origin(kind) is Union:
        return " | ".join(type_name(part) for part in get_args(kind))
    if get_origin(kind) is list:
        return f"list of {type_name(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return " to ".join(type_name(part) for part in get_args(kind))
    return "null" if kind is type(None) else kind.__name__


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of recipes, for editors that check and complete YAML files."""
    schema = object_schema(Recipe, "")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "deltify recipe", **schema}


def object_schema(cls: type, prefix: str) -> dict[str, Any]:
    """Return the schema of one dataclass; `prefix` is the dotted name of its section and a dot."""
    summary, found = describe(cls)
    properties: dict[str, Any] = {}
    for field in found:
        if is_dataclass(field.type):
            properties[field.name] = object_schema(field.type, f"{prefix}{field.name}.")
            continue
        properties[field.name] = value_schema(field.type) | {"description": field.description}
        if choices := choices_of(f"{prefix}{field.name}"):
            properties[field.name]["enum"] = list(choices)
        if field.default is not MISSING:
            properties[field.name]["default"] = field.default
    required = [field.name for field in found if field.default is MISSING]
    schema = {"type": "object", "description": summary, "properties": properties, "additionalProperties": False}
    return schema | ({"required": required} if required else {})


def value_schema(kind: Any) -> dict[str, Any]:
    """Return the schema of a value of this type."""
    if isinstance(kind, types.UnionType) or get_origin(kind) is Union:
        return {"anyOf": [value_schema(part) for part in get_args(kind)]}
    if get_origin(kind) is list:
        return {"type": "array", "items": value_schema(get_args(kind)[0])}
    if get_origin(kind) is dict:
        return {"type": "object", "additionalProperties": value_schema(get_args(kind)[1])}
    return {"type": JSON_TYPES[kind]}


def choices_of(name: str) -> tuple[str, ...] | None:
    """Return the values that a field's dotted name allows, or None if any value of its type may do."""
    section, _, last = name.rpartition(".")
    return STAGE_CHOICES.get(last) if section in STAGES else CHOICES.get(name)


def sections() -> Iterator[tuple[str, str, list[FieldInfo]]]:
    """Yield the name, the summary and the fields of each section of a recipe, the top level first.

    The three stages have the same fields. They are one section, named after all of them.
    """
    summary, found = describe(Recipe)
    yield "", summary, [field for field in found if not is_dataclass(field.type)]
    for field in found:
        if is_dataclass(field.type) and field.name not in STAGES[1:]:
            name = ", ".join(STAGES) if field.name == STAGES[0] else field.name
            yield name, *describe(field.type)


def renamed_fields() -> dict[str, str]:
    """Return the old name of each renamed field and its new name."""
    return dict(RENAMED)
