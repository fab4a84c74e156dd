"""What a tool's JSON schema says about one argument, and an argument's text as a value of that type.

The model writes every argument as text between two tags; only the schema tells whether 3 is a number or a word. One
reading for all: the parser of answers types by it, and the constraint allows what it reads.

    schema = find_schema("get_weather", tools)
    read_value("3", allowed_types(schema["properties"]["days"], schema))
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

Tool = dict[str, Any]

JSON_TYPES = frozenset({"null", "boolean", "integer", "number", "object", "array", "string"})
PYTHON_CONSTANTS = {"True": True, "False": False, "None": None}  # some templates write booleans as Python does
_MAX_SCHEMA_DEPTH = 16  # a schema that refers to itself ends here


def find_schema(name: str, tools: Sequence[Tool]) -> dict[str, Any]:
    """The parameters of the tool of that name, empty if there is none."""
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(function, dict) and function.get("name") == name:
            schema = function.get("parameters")
            return schema if isinstance(schema, dict) else {}
    return {}


def allowed_types(schema: object, root: dict[str, Any], depth: int = 0) -> frozenset[str]:
    """JSON types that a schema allows: of a union all of its members', of a schema that names none all there are."""
    if not isinstance(schema, dict) or depth > _MAX_SCHEMA_DEPTH:
        return JSON_TYPES
    names = schema.get("type")
    types = {name for name in (names if isinstance(names, list) else [names]) if isinstance(name, str)}
    if types & JSON_TYPES:
        return frozenset(types & JSON_TYPES)
    if isinstance(schema.get("$ref"), str):
        return allowed_types(_follow(schema["$ref"], root), root, depth + 1)
    members = _as_list(schema.get("anyOf")) + _as_list(schema.get("oneOf"))
    if members:
        return frozenset[str]().union(*(allowed_types(member, root, depth + 1) for member in members))
    values = [*_as_list(schema.get("enum")), *([schema["const"]] if "const" in schema else [])]
    return frozenset(map(_type_name, values)) if values else JSON_TYPES


def resolve(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema that a chain of references leads to, with the keywords that stand beside them."""
    for _ in range(_MAX_SCHEMA_DEPTH):
        target = _follow(schema["$ref"], root) if isinstance(schema.get("$ref"), str) else None
        if not isinstance(target, Mapping):
            return schema
        schema = {**target, **{key: value for key, value in schema.items() if key != "$ref"}}
    return {}


def _follow(reference: str, root: Mapping[str, Any]) -> object:
    """What a reference within a schema points to, None if nothing."""
    target: object = root
    for key in reference.split("/")[1:]:
        target = target.get(key) if isinstance(target, Mapping) else None
    return target


def read_value(raw: str, allowed: frozenset[str]) -> Any:
    """A parameter's text as the first of: a JSON value of an allowed type, the text as it is."""
    if allowed == {"string"}:
        return raw
    try:
        text = raw.strip()
        value = PYTHON_CONSTANTS[text] if text in PYTHON_CONSTANTS else _read_json(text)
    except (ValueError, RecursionError):
        return raw
    if isinstance(value, float) and value.is_integer() and "number" not in allowed:
        value = int(value)  # to JSON, 3.0 is an integer
    name = _type_name(value)
    fits = name in allowed or (name == "integer" and "number" in allowed)
    return value if fits and name != "string" else raw


def _read_json(text: str) -> Any:
    """JSON that can be written again: no NaN, no infinity, no lone surrogate. Raises ValueError or RecursionError."""

    def read_number(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number} is no JSON number")
        return value

    value = json.loads(text, parse_float=read_number, parse_constant=read_number)
    json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def _type_name(value: object) -> str:
    names = {bool: "boolean", int: "integer", float: "number", dict: "object", list: "array", str: "string"}
    return names.get(type(value), "null")


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
