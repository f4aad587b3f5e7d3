"""Is a tool call fit to be acted upon?

An agent executes what it is given, so a call is checked before it leaves: its arguments are a JSON object, its tool was
offered, what the tool requires is there, and each top-level argument is of a type its schema allows. Deeper than that
vendors' schemas are too often wrong themselves to refuse an answer over them.

Repair is done only where it is certain: the arguments stand in a code fence, are JSON encoded twice, or have a comma
before a closing bracket, and what comes out satisfies the schema. Anything else is never guessed at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

Schemas = Mapping[str, Mapping[str, Any]]  # tool -> the JSON Schema of its arguments

BAD_ARGUMENTS = "bad_arguments"  # not a JSON object, and not repairable: nobody could act on it

_FENCE = re.compile(r"\A\s*```[a-zA-Z]*\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)
_STRING_OR_COMMA = re.compile(r'"(?:[^"\\]|\\.)*"|,(?=\s*[}\]])')


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "number": _is_number,
    "integer": lambda value: _is_number(value) and float(value).is_integer(),
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
    if schemas and name not in schemas:
        return Checked("unknown_tool")
    schema = schemas.get(name, {})
    value = _object(arguments)
    if value is not None:
        return Checked(_misfit(value, schema))
    for candidate in _repairs(arguments) if schema else ():
        value = _object(candidate)
        if value is not None and not _misfit(value, schema):
            return Checked(repaired=candidate)
    return Checked(BAD_ARGUMENTS)


def _object(text: str) -> dict[str, Any] | None:
    """The arguments, if they are a JSON object. No text at all is how some vendors spell ``{}``."""
    if not text.strip():
        return {}
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


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
    fenced = _FENCE.match(text)
    if fenced is not None:
        text = fenced.group(1)
        yield text
    try:
        inner = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        yield _STRING_OR_COMMA.sub(lambda match: match.group(0) if match.group(0) != "," else "", text)
        return
    if isinstance(inner, str):
        yield inner
