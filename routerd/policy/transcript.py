"""What may go downstream, and what already has.

Theory of operation
-------------------
Two folds over the same events, one on each side of the client's socket:

* ``Gate`` (per attempt, upstream side) takes every frame as it arrives and gives back those that may go on. It holds

  - everything before the first content: until then a failure is hidden by simply forgetting what was held;
  - everything from the first tool call to the model's own finish: an agent cannot act on half a call, so holding one
    costs it nothing, and a death in the middle of a call can be re-run unseen;
  - everything at all under ``whole`` delivery.

  At the finish it checks the answer: a call that an agent cannot act on, or an answer with neither text nor call,
  raises ``BadAnswer`` while the frames are still held. What it raises on, it never releases. A call whose arguments
  could be repaired with certainty leaves in frames of its own.

* ``Transcript`` (per exchange, downstream side) folds what the client has really been sent. It is all that recovery
  needs to know of the past.

The gate is one loop over events with no timers: silence is the caller's business (``progress`` says whether the last
frames carried content; comments and pings do not count).

Ugly: after a call has begun, text of the same answer is held too, because frames keep their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from routerd.canonical import (
    End,
    Event,
    Fault,
    Finish,
    Frame,
    ReasoningDelta,
    Start,
    TextDelta,
    ToolDelta,
    ToolStart,
    Usage,
    UsageReport,
)
from routerd.policy.calls import BAD_ARGUMENTS, Schemas, check

TEXT_CHARACTERS_MAX = 4 * 1024 * 1024  # of an answer's text kept for taking it up again
HELD_BYTES_MAX = 16 * 1024 * 1024  # more held than this is no answer of a sane model


class BadAnswer(Exception):
    """The upstream's answer cannot be used as it is. ``code`` says why, in our closed vocabulary."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class InBandFault(Exception):
    """The upstream reported an error inside its 200."""

    def __init__(self, fault: Fault) -> None:
        super().__init__("in-band error")
        self.fault = fault


class Call(msgspec.Struct):
    """A tool call being collected. ``index`` is its place among the answer's calls."""

    index: int
    id: str
    name: str
    arguments: list[str] = msgspec.field(default_factory=list)

    repaired: str | None = None


class Gate:
    """Holds an attempt's frames until they may go downstream."""

    __slots__ = (
        "_held",
        "_held_bytes",
        "_open",
        "_schemas",
        "_strict",
        "_whole",
        "calls",
        "characters",
        "ended",
        "finished",
        "progress",
        "repairs",
        "start",
        "started",
        "text",
        "usage",
    )

    def __init__(self, *, whole: bool, schemas: Callable[[], Schemas] | None = None, strict: bool = True) -> None:
        """``schemas`` gives those of the request's tools, asked for only when a call is made.

        Not ``strict``: a call that is JSON but does not fit its schema passes. A model that insists on it should not
        cost the turn.
        """
        self._whole = whole
        self._schemas = schemas
        self._strict = strict
        self.repairs = 0
        self._open = False  # frames pass as they come
        self._held: list[Frame] = []
        self._held_bytes = 0
        self.start: Start | None = None
        self.started = False  # content of any kind has arrived
        self.text = False
        self.calls: list[Call] = []
        self.characters = 0  # of text, reasoning and arguments: the base of an estimate when usage never comes
        self.finished: Finish | None = None
        self.ended = False
        self.usage: Usage | None = None
        self.progress = False  # the last frames carried content

    def admit(self, frames: Iterable[Frame]) -> list[Frame]:
        """Take what arrived; give what may be sent now. Raises ``BadAnswer`` and ``InBandFault``."""
        self.progress = False
        passed: list[Frame] = []
        for frame in frames:
            for event in frame.events:
                _FOLDS[type(event)](self, event)
            if self._open:
                passed += self._take(frame)
            else:
                self._hold(frame)
        return passed

    def _take(self, frame: Frame) -> list[Frame]:
        if not self._held:
            return [frame]
        self._held.append(frame)
        return self.close()

    def _hold(self, frame: Frame) -> None:
        self._held.append(frame)
        self._held_bytes += len(frame.raw)
        if self._held_bytes > HELD_BYTES_MAX:
            raise BadAnswer("too_long_held")

    def close(self) -> list[Frame]:
        """The upstream is at its end and the answer is whole: what is still held may go."""
        passed, self._held, self._held_bytes = self._held, [], 0
        return [self._mended(frame) for frame in passed] if self.repairs else passed

    def _mended(self, frame: Frame) -> Frame:
        """The frame with repaired arguments in place of the model's; without bytes, so that it is encoded anew."""
        if not any(type(event) in (ToolStart, ToolDelta) for event in frame.events):
            return frame
        repaired = {call.index: call.repaired for call in self.calls if call.repaired is not None}
        events: list[Event] = []
        for event in frame.events:
            if type(event) is ToolDelta and event.index in repaired:
                continue
            events.append(event)
            if type(event) is ToolStart and event.index in repaired:
                events.append(ToolDelta(event.index, repaired[event.index]))
        return Frame(b"", tuple(events))

    # --- one method per kind of event -------------------------------------------------------------------------------

    def on_start(self, event: Start) -> None:
        self.start = self.start or event

    def on_text(self, event: TextDelta) -> None:
        self.text = True
        self._content(len(event.text))

    def on_reasoning(self, event: ReasoningDelta) -> None:
        self._content(len(event.text))

    def _content(self, characters: int) -> None:
        self.characters += characters
        self.started = self.progress = True
        if not self._whole and not self.calls:
            self._open = True

    def on_tool_start(self, event: ToolStart) -> None:
        self.started = self.progress = True
        self._open = False
        self.calls.append(Call(event.index, event.id, event.name))

    def on_tool_delta(self, event: ToolDelta) -> None:
        self.progress = True
        self.characters += len(event.arguments)
        for call in reversed(self.calls):
            if call.index == event.index:
                call.arguments.append(event.arguments)
                return
        raise BadAnswer("arguments_without_call")

    def on_usage(self, event: UsageReport) -> None:
        self.usage = event.usage

    def on_finish(self, event: Finish) -> None:
        if self.calls:
            self._check_calls()
        if not self.calls and not self.text and event.reason in ("stop", "tool_calls"):
            raise BadAnswer("empty_answer")
        self.finished = event
        self.progress = True
        self._open = not self._whole

    def _check_calls(self) -> None:
        schemas = self._schemas() if self._schemas is not None else {}
        if any(not call.name for call in self.calls):
            raise BadAnswer("nameless_call")
        for call in self.calls:
            checked = check(call.name, "".join(call.arguments), schemas)
            if checked.code == BAD_ARGUMENTS or (checked.code and self._strict):
                raise BadAnswer(checked.code)
            if checked.repaired is not None:
                call.repaired = checked.repaired
                self.repairs += 1

    def on_end(self, event: End) -> None:  # noqa: ARG002 - every fold has the same shape
        self.ended = True

    def on_fault(self, event: Fault) -> None:
        raise InBandFault(event)


_FOLDS: dict[type, Callable[[Gate, Any], None]] = {
    Start: Gate.on_start,
    TextDelta: Gate.on_text,
    ReasoningDelta: Gate.on_reasoning,
    ToolStart: Gate.on_tool_start,
    ToolDelta: Gate.on_tool_delta,
    UsageReport: Gate.on_usage,
    Finish: Gate.on_finish,
    End: Gate.on_end,
    Fault: Gate.on_fault,
}


class Transcript:
    """Fold of the events the client has received."""

    __slots__ = ("_characters", "_text", "calls", "ended", "finished", "reasoning", "start")

    def __init__(self) -> None:
        self.start: Start | None = None
        self._text: list[str] = []
        self._characters = 0
        self.reasoning = False
        self.calls = 0
        self.finished = False
        self.ended = False

    @property
    def committed(self) -> bool:
        """True once text or a call is with the client: what was said cannot be unsaid. Reasoning can be begun anew."""
        return self._characters > 0 or self.calls > 0

    @property
    def begun(self) -> bool:
        """True once anything at all of an answer is with the client."""
        return self.start is not None or self.reasoning or self.committed

    @property
    def text(self) -> str | None:
        """All the text the client has; None if it is more than is kept."""
        return "".join(self._text) if self._characters <= TEXT_CHARACTERS_MAX else None

    def fold(self, events: Iterable[Event]) -> None:
        for event in events:
            kind = type(event)
            if kind is TextDelta:
                self._note(event.text)  # type: ignore[union-attr]  # kind is checked above
            elif kind is ReasoningDelta:
                self.reasoning = True
            elif kind is ToolStart:
                self.calls += 1
            elif kind is Finish:
                self.finished = True
            elif kind is End:
                self.ended = True
            elif kind is Start:
                self.start = self.start or event  # type: ignore[assignment]  # kind is checked above

    def _note(self, text: str) -> None:
        self._characters += len(text)
        if self._characters <= TEXT_CHARACTERS_MAX:
            self._text.append(text)
        else:
            self._text.clear()
