"""An upstream that speaks Messages, driven by a script, over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import msgspec

from routerd.canonical import (
    End,
    Event,
    Failure,
    Finish,
    FinishReason,
    Outcome,
    ReasoningDelta,
    Side,
    Start,
    TextDelta,
    ToolDelta,
    ToolStart,
    Usage,
    UsageReport,
)
from routerd.dialects import Stamp
from routerd.dialects.messages import DIALECT
from tests.proxy.wire import LAST_CHUNK, RawUpstream, Talk
from tests.rig import KEY, MODEL

MESSAGES = "/v1/messages"
USAGE = Usage(input_tokens=40, cached_tokens=8, output_tokens=20)
SIGNATURE = "EqQBCgIYAhIM1gbcDa9GJwZA2b3h"

End_ = Literal["whole", "tear", "eof", "stall", "pause", "error"]
Place = Literal["first", "mid_thinking", "mid_text", "mid_call"]
_PLACES: dict[Place, tuple[type, int]] = {  # the event before which it ends, and how many of them come before
    "first": (TextDelta, 0),
    "mid_thinking": (ReasoningDelta, 1),
    "mid_text": (TextDelta, 2),
    "mid_call": (ToolDelta, 1),
}


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """One answer, and how it ends: ``how`` and, if not whole, at which ``place``. ``status``: refused with that."""

    text: str = ""
    thinking: str = ""
    signature: str = SIGNATURE
    calls: tuple[tuple[str, str], ...] = ()  # name and arguments
    finish: FinishReason | None = None
    how: End_ = "whole"
    place: Place = "mid_text"
    pause_s: float = 0.0
    status: int = 200

    def events(self) -> list[Event]:
        events: list[Event] = [Start("msg_1", MODEL)]
        events += [ReasoningDelta(0, word) for word in _words(self.thinking)]
        if self.thinking and self.signature:
            events.append(ReasoningDelta(0, "", self.signature))
        events += [TextDelta(0, word) for word in _words(self.text)]
        for index, (name, arguments) in enumerate(self.calls):
            events.append(ToolStart(index, f"toolu_{index}", name))
            events += [ToolDelta(index, arguments[:9]), ToolDelta(index, arguments[9:])]
        reason = self.finish or ("tool_calls" if self.calls else "stop")
        return [*events, Finish(reason), UsageReport(USAGE), End()]

    def stop_at(self, events: list[Event]) -> int:
        """How many events come before it ends."""
        if self.how == "whole":
            return len(events)
        kind, count = _PLACES[self.place]
        places = [place for place, event in enumerate(events) if type(event) is kind]
        return places[min(count, len(places) - 1)]


def _words(text: str) -> list[str]:
    return [word + " " for word in text.split(" ")[:-1]] + [text.rsplit(" ", maxsplit=1)[-1]] if text else []


Step = Said | Callable[[dict[str, Any]], Said]


class MessagesUpstream(RawUpstream):
    """Plays one step for each request; the last one repeats."""

    dialect: ClassVar[str] = "messages"

    def __init__(self, *steps: Step) -> None:
        super().__init__(self._answer)
        self._steps = steps

    async def _answer(self, talk: Talk) -> None:
        step = self._steps[min(len(self.talks), len(self._steps)) - 1]
        said = step if isinstance(step, Said) else step(talk.body)
        stamp = Stamp("msg_1", MODEL, 0)
        if said.status != 200:
            failure = Failure(Outcome.UNAVAILABLE, Side.ROUTER, "scripted", status=said.status)
            await _whole(talk, DIALECT.encode_error(failure), said.status)
        elif not talk.body.get("stream"):
            await _whole(talk, DIALECT.encode_body(said.events(), stamp))
        else:
            await self._stream(talk, said, stamp)

    async def _stream(self, talk: Talk, said: Said, stamp: Stamp) -> None:
        events, encoder = said.events(), DIALECT.encoder(stamp)
        stop = said.stop_at(events)
        await talk.stream([data for data in map(encoder.encode, events[:stop]) if data], end=False)
        if said.how == "error":
            failure = Failure(Outcome.UNAVAILABLE, Side.ROUTER, "Overloaded", status=503)
            await _chunk(talk, encoder.error(failure))
        if said.how == "tear":
            return
        if said.how in ("stall", "pause"):
            await asyncio.sleep(3600 if said.how == "stall" else said.pause_s)
            for data in filter(None, map(encoder.encode, events[stop:])):
                await _chunk(talk, data)
        await talk.send(LAST_CHUNK)


async def _chunk(talk: Talk, data: bytes) -> None:
    await talk.send(b"%x\r\n%b\r\n" % (len(data), data))


async def _whole(talk: Talk, body: bytes, status: int = 200) -> None:
    head = b"HTTP/1.1 %d Scripted\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
    await talk.send(head % (status, len(body)) + body)


def after_tools(body: Mapping[str, Any]) -> bool:
    """True if the conversation ends with a tool's result, in this dialect or as chat has it."""
    last = body["messages"][-1]
    return last["role"] == "tool" or '"tool_result"' in json.dumps(last)


def going_on(body: Mapping[str, Any]) -> bool:
    """True if an answer that broke off is to be taken up, by words or by a trailing assistant turn."""
    before, last = body["messages"][-2], body["messages"][-1]
    return last["role"] == "assistant" or (before["role"] == "assistant" and not after_tools(body))


def agent(name: str, arguments: str, done: str, *, text: str = "") -> Callable[[dict[str, Any]], Said]:
    """A model that calls the tool once and closes when it has the result."""
    return lambda body: Said(text=done) if after_tools(body) else Said(text=text, calls=((name, arguments),))


def table(name: str, base_url: str, dialect: str, extra: str = "") -> str:
    """TOML for one provider that speaks this dialect."""
    return f"""
[providers.{name}]
base_url = "{base_url}"
dialect = "{dialect}"
api_key = "{KEY}"
{extra}
[providers.{name}.models]
"{MODEL}" = {{ context = 131072, max_output = 8192, images = true, input = 1, output = 2 }}
"""


def mixed_config(upstreams: Mapping[str, tuple[str, str]], *, defaults: str = "", more: str = "") -> str:
    """TOML for a daemon over providers given as name -> (dialect, base URL); ``auto`` tries them in order."""
    providers = "".join(table(name, url, dialect) for name, (dialect, url) in upstreams.items())
    tiers = ", ".join(f'"{name}/{MODEL}"' for name in upstreams)
    return f"""
[server]
listen = "127.0.0.1:0"
[state]
url = "memory:"
[defaults]
{defaults}
[routes.auto]
models = [{tiers}]
{more}
{providers}
"""
