"""Is a tool call fit to be acted upon?

An agent executes what it is given, so a call is checked before it leaves: its arguments are a JSON object, its tool was
offered, what the tool requires is there, and each top-level argument is of a type its schema allows. Deeper than that
vendors' schemas are too often wrong themselves to refuse an answer over them.

Repair is done only where it is certain: there are no arguments at all, which is how some vendors spell ``{}``; or they
stand in a code fence, are JSON encoded twice, or have a comma between a value and a closing bracket, and what comes out
satisfies the schema. Anything else is never guessed at.

What is ugly: msgspec refuses lone surrogates (an emoji that the model cut in two), although agents read them. Then, and
only then, the standard library has the last word on what is JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

Schemas = Mapping[str, Mapping[str, Any]]  # tool -> the JSON Schema of its arguments

BAD_ARGUMENTS = "bad_arguments"  # not a JSON object, and not repairable: nobody could act on it

FENCE = "```"
_LANGUAGE = re.compile(r"[a-zA-Z]*\s")

# Strings (the last one perhaps cut off) and commas after no value stand in the way of the commas looked for. Each
# alternative takes all it has looked at, so the time is linear even for arguments of a megabyte.
_TRAILING_COMMA = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[{\[,:]\s*,|(?P<comma>,)(?=\s*[}\]])', re.DOTALL)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "number": _is_number,
    "integer": lambda value: _is_number(value) and (isinstance(value, int) or value.is_integer()),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
    "null": lambda value: value is None,
}


class Checked(msgspec.Struct, frozen=True):
    """``code``: what is wrong, if anything. ``repaired``: better arguments, where repair was needed and certain."""

    code: str = ""
    repaired: str | None = None


def check(name: str, arguments: str, schemas: Schemas) -> Checked:
    """Check one whole call. With no schemas at all (no tools offered, or unreadable) only the JSON is checked."""
    schema = schemas.get(name, {})
    blank = not arguments.strip()
    value = {} if blank else _object(arguments)
    if value is not None:
        unknown = schemas and name not in schemas
        return Checked("unknown_tool" if unknown else _misfit(value, schema), repaired="{}" if blank else None)
    for candidate in _repairs(arguments) if schema else ():
        value = _object(candidate)
        if value is not None and not _misfit(value, schema):
            return Checked(repaired=candidate)
    return Checked(BAD_ARGUMENTS)


def _object(text: str) -> dict[str, Any] | None:
    """The arguments, if they are a JSON object."""
    value = _decoded(text)
    return value if isinstance(value, dict) else None


def _decoded(text: str) -> Any:
    """The value; None if it is not JSON (or is null: of no use here either)."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        pass
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    """NaN and the like are JSON to Python alone."""
    raise ValueError(constant)


def _misfit(value: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    required = schema.get("required")
    if isinstance(required, list) and any(isinstance(name, str) and name not in value for name in required):
        return "missing_argument"
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return ""
    return next(("wrong_type" for name, given in value.items() if not _allowed(given, properties.get(name))), "")


def _allowed(value: Any, schema: Any) -> bool:
    """True unless the schema names types and the value has none of them."""
    if not isinstance(schema, dict) or schema.get("nullable") is True:
        return True
    types = schema.get("type")
    names = types if isinstance(types, list) else [types]
    known = [_TYPES[name] for name in names if isinstance(name, str) and name in _TYPES]
    return not known or any(fits(value) for fits in known)


def _repairs(text: str) -> Iterator[str]:
    bare = _without_fence(text)
    if bare != text:
        yield bare
    inner = _decoded(bare)
    if isinstance(inner, str):
        yield inner
    elif inner is None:
        yield _TRAILING_COMMA.sub(lambda match: "" if match["comma"] else match[0], bare)


def _without_fence(text: str) -> str:
    stripped = text.strip()
    if not (len(stripped) > 2 * len(FENCE) and stripped.startswith(FENCE) and stripped.endswith(FENCE)):
        return text
    inside = stripped[len(FENCE) : -len(FENCE)]
    language = _LANGUAGE.match(inside)
    return inside[language.end() :].strip() if language else inside.strip()
