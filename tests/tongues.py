"""One script, three dialects: upstreams that say the same thing in the same way, each in its own words."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final, Literal

from routerd.canonical import COMPLETE
from routerd.proxy.scripts import Answer, Call, Fault, Place, PlacedKind, Received, Turn
from tests.fakes import ScriptedUpstream
from tests.messages_fake import USAGE, MessagesUpstream, Said, Step
from tests.messages_fake import Place as SaidPlace
from tests.responses_fake import ResponsesUpstream, text_of

Kind = Literal["responses", "chat", "messages"]
KINDS: Final[tuple[Kind, ...]] = ("responses", "chat", "messages")
Upstream = ScriptedUpstream | MessagesUpstream

_KINDS_OF_FAULT: Final[dict[str, PlacedKind]] = {
    "tear": "tear",
    "eof": "eof",
    "stall": "stall",
    "pause": "pause",
    "error": "error",
}
_PLACES: Final[dict[SaidPlace, Place]] = {
    "first": "before_content",
    "mid_thinking": "in_reasoning",
    "mid_text": "mid_text",
    "mid_call": "mid_call",
}
PACE_S: Final = 0.005  # between the events of one that breaks off, so that each is a read of its own


def speaking(kind: Kind, *steps: Step) -> Upstream:
    """An upstream of this kind that plays these steps, one for each request; the last one repeats."""
    if kind == "messages":
        return MessagesUpstream(*steps)
    upstream = ResponsesUpstream if kind == "responses" else ScriptedUpstream
    return upstream(*map(_turn, steps))


def bodies(upstream: Upstream) -> list[dict[str, Any]]:
    """The requests so far, in the upstream's dialect."""
    if isinstance(upstream, MessagesUpstream):
        return [talk.body for talk in upstream.talks]
    return [json.loads(request.raw) for request in upstream.requests]


def _turn(step: Step) -> Turn | Callable[[Received], Turn]:
    return _turn_of(step) if isinstance(step, Said) else lambda request: _turn_of(step(request.body))


def _turn_of(said: Said) -> Turn:
    calls = tuple(Call(name, arguments) for name, arguments in said.calls)
    answer = Answer(
        text=said.text,
        final_text=said.text,
        reasoning=said.thinking,
        calls=calls,
        finish=said.finish,
        usage=USAGE,
        pace_s=0.0 if said.how == "whole" else PACE_S,
    )
    return Turn(answer, _fault(said))


def _fault(said: Said) -> Fault | None:
    if said.status != 200:
        return Fault("status", status=said.status)
    if said.how == "whole":
        return None
    return Fault(_KINDS_OF_FAULT[said.how], _PLACES[said.place], seconds=said.pause_s)


# --- going on with what broke off -------------------------------------------------------------------------------------


def rest_of(said: Said) -> Step:
    """A model that says this, and asked to go on with a part of it says the rest."""

    def step(body: dict[str, Any]) -> Said:
        shown = _shown(body["messages"])
        if shown is None or not said.text.startswith(shown):
            return said
        return Said(text=said.text[len(shown) :] or COMPLETE, calls=said.calls)

    return step


def _shown(messages: list[dict[str, Any]]) -> str | None:
    """The part of an answer that is to be gone on with; None if that is not what is asked."""
    if messages[-1]["role"] == "assistant":
        return text_of(messages[-1]["content"])
    asked = len(messages) > 1 and messages[-2]["role"] == "assistant" and COMPLETE in text_of(messages[-1]["content"])
    return text_of(messages[-2]["content"]) if asked else None
