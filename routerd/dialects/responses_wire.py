"""What Responses servers send, as far as it is of use here: events, items and responses, and the words in them."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from routerd.canonical import Fault, FinishReason, UpstreamProtocolError, Usage, UsageReport
from routerd.dialects.chat_request import JSON_ERRORS
from routerd.dialects.faults import read_fault, read_json
from routerd.dialects.tokens import cost_usd, count

_encode: Final = msgspec.json.Encoder().encode


# --- the wire ---------------------------------------------------------------------------------------------------------


class WirePart(msgspec.Struct, gc=False):
    """A part of an item's content or of its summary."""

    type: str = ""
    text: str | None = None
    refusal: str | None = None


class WireItem(msgspec.Struct, gc=False):
    type: str = ""
    id: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: Any = None  # a string; some servers send the object itself
    status: str | None = None
    content: list[WirePart] | None = None
    summary: list[WirePart] | None = None
    encrypted_content: str | None = None


class WireResponse(msgspec.Struct, gc=False):
    object: str = ""
    id: str | None = None
    model: str | None = None
    status: str | None = None
    output: list[msgspec.Raw] | None = None
    error: Any = None
    incomplete_details: Any = None
    usage: Any = None


class WireEvent(msgspec.Struct, gc=False):
    type: str = ""
    sequence_number: int | None = None
    output_index: int | None = None
    item_id: str | None = None
    content_index: int | None = None
    summary_index: int | None = None
    delta: str | None = None
    text: str | None = None
    refusal: str | None = None
    arguments: Any = None
    part: WirePart | None = None
    item: msgspec.Raw = msgspec.Raw()
    response: msgspec.Raw = msgspec.Raw()
    error: Any = None


class _Kind(msgspec.Struct, gc=False):
    type: str = ""


decode_event: Final = msgspec.json.Decoder(WireEvent).decode
_decode_kind: Final = msgspec.json.Decoder(_Kind).decode
_decode_item: Final = msgspec.json.Decoder(WireItem).decode
decode_response: Final = msgspec.json.Decoder(WireResponse).decode
_NO_ITEM: Final = WireItem()
_NO_RESPONSE: Final = WireResponse()


def read_item(raw: msgspec.Raw) -> WireItem:
    """Raises ``UpstreamProtocolError``."""
    try:
        return _decode_item(raw) if raw else _NO_ITEM
    except JSON_ERRORS:
        return _read_odd_item(raw)


def _read_odd_item(raw: msgspec.Raw) -> WireItem:
    """An item of a kind whose fields have other types than those used here; of a known kind it is an error."""
    try:
        kind = _decode_kind(raw).type
    except JSON_ERRORS:
        kind = "message"
    if kind in KINDS:
        raise UpstreamProtocolError("JSON that is no item of a response")
    identity = read_json(bytes(raw))
    texts = {name: identity[name] for name in ("id", "call_id", "name") if isinstance(identity.get(name), str)}
    return WireItem(kind, **texts)


def read_response(raw: msgspec.Raw) -> WireResponse:
    """Raises ``UpstreamProtocolError``."""
    try:
        return decode_response(raw) if raw else _NO_RESPONSE
    except JSON_ERRORS:
        raise UpstreamProtocolError("JSON that is no response") from None


# --- kinds of items, endings ------------------------------------------------------------------------------------------

Kind = Literal["message", "reasoning", "function_call", "act", "other"]
KINDS: Final[dict[str, Kind]] = {
    "message": "message",
    "reasoning": "reasoning",
    "function_call": "function_call",
}
# What a client is to do that is no call of a function (API reference, 2026-11), and pictures, which like calls are of
# use only whole. Each has a mark, the signature of its call, from which it is known when it is written again.
ACT_MARKS: Final[dict[str, str]] = {
    kind: _encode({"type": kind}).decode()
    for kind in (
        "apply_patch_call",
        "computer_call",
        "custom_tool_call",
        "image_generation_call",
        "local_shell_call",
        "mcp_approval_request",
        "shell_call",
    )
}
# Done by the server on the way to an answer; the answer itself is none of these.
SERVER_KINDS: Final = frozenset(
    {
        "code_interpreter_call",
        "compaction",
        "file_search_call",
        "mcp_call",
        "mcp_list_tools",
        "tool_search_call",
        "tool_search_output",
        "web_search_call",
    }
)
CALL_KINDS: Final[tuple[Kind, ...]] = ("function_call", "act")

_CUT_REASONS: Final[dict[str, FinishReason]] = {
    "content_filter": "content_filter",
    "max_messages": "stop",
    "max_output_tokens": "length",
    "max_tool_calls": "stop",
    "steered": "stop",
}
# Error codes of this API that have no number (API reference and error guide, 2026-11).
_FAULT_STATUSES: Final[dict[str, int]] = {
    "context_length_exceeded": 400,
    "insufficient_quota": 429,
    "invalid_prompt": 400,
    "model_not_found": 404,
    "rate_limit_exceeded": 429,
    "server_error": 500,
    "server_is_overloaded": 503,
    "slow_down": 503,
}


def kind_of(name: str) -> Kind:
    """What an item of this type is to us: an ``act`` is a client's to do, ``other`` is bytes."""
    return KINDS.get(name) or ("act" if name in ACT_MARKS else "other")


def with_status(fault: Fault) -> Fault:
    """The fault with the HTTP status its code stands for, where it has none."""
    if fault.status is not None or fault.code not in _FAULT_STATUSES:
        return fault
    return Fault(_FAULT_STATUSES[fault.code], fault.code, fault.message)


def failed(status: str, error: Any) -> Fault:
    """The fault of a response that failed or was cancelled, perhaps without a word."""
    fault = read_fault(error)
    return with_status(fault) if fault.code or fault.message else Fault(None, status, "")


def cut_reason(details: Any) -> FinishReason:
    """Why an answer is incomplete; for an unknown reason it is too short."""
    reason = details.get("reason") if isinstance(details, dict) else None
    return _CUT_REASONS.get(reason, "length") if isinstance(reason, str) else "length"


def read_usage(report: Any) -> UsageReport | None:
    """None if there is no report."""
    if not isinstance(report, dict):
        return None
    inputs, outputs = report.get("input_tokens_details"), report.get("output_tokens_details")
    cached = count(inputs.get("cached_tokens")) if isinstance(inputs, dict) else 0
    thinking = count(outputs.get("reasoning_tokens")) if isinstance(outputs, dict) else 0
    entered, left = count(report.get("input_tokens")), count(report.get("output_tokens"))
    return UsageReport(
        Usage(
            input_tokens=entered,
            cached_tokens=min(cached, entered),
            output_tokens=left,
            reasoning_tokens=min(thinking, left),
            cost_usd=cost_usd(report.get("cost")),
        )
    )
