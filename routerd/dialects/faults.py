"""Errors in every shape servers put them into, read the same in all dialects.

An error can be an event of its own, a field of an ordinary chunk, or a JSON body where a stream was asked for; and who
stands behind a gateway may well report it in another dialect's words. So what can be an error is looked for in one way
everywhere, and what is none of the known shapes is no answer of a model either.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec

from routerd.canonical import Failure, Fault, Outcome, Side, UpstreamProtocolError
from routerd.dialects.chat_request import JSON_ERRORS, mended
from routerd.dialects.sse import BODY, Block

FAULT_TEXT_MAX: Final = 2000  # characters of an upstream's error kept for the classifier

_encode: Final = msgspec.json.Encoder().encode


def read_fault(error: Any) -> Fault:
    """Read an ``error`` value: an object in one of several shapes, or a plain string."""
    if not isinstance(error, dict):
        return Fault(None, "", error[:FAULT_TEXT_MAX] if isinstance(error, str) else "")
    metadata = error.get("metadata")
    kind = metadata.get("error_type") if isinstance(metadata, dict) else None
    spoken = (error.get("code"), error.get("error_code"), error.get("status"), error.get("status_code"))
    words = (error.get("code"), error.get("error_type"), kind, error.get("type"), error.get("status"))
    message = error.get("message") or error.get("msg") or error.get("status_msg") or error.get("detail") or ""
    return Fault(
        next((status for status in map(_status, spoken) if status is not None), None),
        next((word for word in words if isinstance(word, str) and word and not word.isdigit()), _word(spoken)),
        (message if isinstance(message, str) else _encode(message).decode())[:FAULT_TEXT_MAX],
    )


def _status(value: Any) -> int | None:
    """Return an HTTP error status given as a number or as digits."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) == 3:
        value = int(value)
    return value if isinstance(value, int) and 400 <= value < 600 else None


def _word(values: Iterable[Any]) -> str:
    """Return the first code that is a number, as text."""
    return next((str(value) for value in values if isinstance(value, int | str) and value), "")


def find_fault(value: Any) -> Fault | None:
    """Look for an error in JSON that is no answer. Shapes: ``{"error": ...}``, a list of that, a flat error object,
    ``{"base_resp": {"status_code": ...}}``, ``{"detail": ...}``.
    """
    if isinstance(value, list):
        return find_fault(value[0]) if value and not isinstance(value[0], list) else None
    if not isinstance(value, dict):
        return None
    if value.get("error"):
        return read_fault(value["error"])
    if value.get("object") == "error" or value.get("type") == "error" or "detail" in value:
        return read_fault(value)
    reply = value.get("base_resp")
    if isinstance(reply, dict) and reply.get("status_code"):
        return read_fault(reply)
    return read_fault(value) if _status(value.get("status") or value.get("code")) is not None else None


def read_json(data: bytes) -> Any:
    """Decode JSON of unknown shape. Raises ``UpstreamProtocolError``."""
    try:
        return msgspec.json.decode(data)
    except JSON_ERRORS:
        pass
    try:
        return msgspec.json.decode(mended(data))
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
        raise UpstreamProtocolError("not JSON") from None


def named_fault(block: Block) -> Fault | None:
    """Return the fault of an ``error`` block, or of a JSON body in place of a stream."""
    if block.event == BODY:
        fault = find_fault(read_json(block.data))
        if fault is None:
            raise UpstreamProtocolError("a JSON body in place of a stream")
        return fault
    if block.event != b"error":
        return None
    try:
        value = read_json(block.data)
    except UpstreamProtocolError:
        value = block.data.decode("utf-8", "replace")
    return find_fault(value) or read_fault(value)


# An upstream's own status is not the client's: its 401 is about our key.
_STATUSES: Final[dict[Outcome, int]] = {
    Outcome.RATE_LIMITED: 429,
    Outcome.EXHAUSTED: 429,
    Outcome.STALLED: 504,
    Outcome.TRUNCATED: 502,
    Outcome.IN_BAND_ERROR: 502,
    Outcome.MALFORMED: 502,
    Outcome.UNSUPPORTED: 400,
    Outcome.CLIENT_ERROR: 400,
}


def told_status(failure: Failure) -> int:
    """The HTTP status a client is told, also inside a stream, where it only names the kind of error."""
    status = None if failure.side is Side.UPSTREAM else failure.status
    return status or _STATUSES.get(failure.outcome, 503)


# status: (type, code). No text here may hold words that clients take for a full context window or a billing stop.
_ERRORS: Final[dict[int, tuple[str, str]]] = {
    400: ("invalid_request_error", "invalid_request"),
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "forbidden"),
    404: ("invalid_request_error", "model_not_found"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", "internal_error"),
    502: ("server_error", "bad_gateway"),
    503: ("server_error", "overloaded"),
    504: ("server_error", "timeout"),
}


# Which field of the request an error is about, where clients look for that.
_PARAMS: Final = {"previous_response_not_found": "previous_response_id"}


def told_error(failure: Failure) -> dict[str, Any]:
    """The failure as an error object of OpenAI's APIs."""
    upstream = failure.side is Side.UPSTREAM
    status = told_status(failure)
    kind, code = _ERRORS.get(status) or _ERRORS[400 if status < 500 else 500]
    return {
        "message": failure.detail,
        "type": kind,
        "param": _PARAMS.get(failure.code),
        "code": code if upstream else failure.code or code,
    }
