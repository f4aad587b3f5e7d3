"""What may go downstream, and what already has.

Theory of operation
-------------------
Two folds over the same events, one on each side of the client's socket:

* ``Gate`` (per attempt, upstream side) takes every frame as it arrives and gives back those that may go on. It holds

  - everything before the first content: until then a failure is hidden by simply forgetting what was held;
  - everything from the first tool call to the model's own finish: an agent cannot act on half a call, so holding one
    costs it nothing, and a death in the middle of a call can be re-run unseen;
  - everything at all under ``whole`` delivery.

  Blank text is not content yet: it says nothing, and a text that begins with it may turn out to be all there is.

  At the finish it checks the answer: a call that an agent cannot act on, or an answer with neither text nor call,
  raises ``BadAnswer`` while the frames are still held. What it raises on, it never releases. A call whose arguments
  could be repaired with certainty leaves in frames of its own. After the finish nothing can make the answer less whole:
  what an upstream then still reports as an error is dropped.

  Some faults are *forgiven*: those another attempt at this exchange had as well. One model that calls a tool wrongly is
  an accident, a second one means that this is how they understand the tool; and a call that the length limit cuts off
  everywhere is left out, so that the client at least learns about the limit. Arguments that are not JSON never pass.

* ``Transcript`` (per exchange, downstream side) folds what the client has really been sent. It is all that recovery
  needs to know of the past.

The gate is one loop over events with no timers: silence is the caller's business (``progress`` says whether the last
frames carried content; comments and pings do not count).

Ugly: after a call has begun, text of the same answer is held too, because frames keep their order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import msgspec

from routerd.canonical import (
    End,
    Event,
    Fault,
    Finish,
    Frame,
    Reasoning,
    ReasoningDelta,
    Remembered,
    Start,
    TextDelta,
    ToolDelta,
    ToolStart,
    Usage,
    UsageReport,
)
from routerd.policy.calls import BAD_ARGUMENTS, Schemas, check

TEXT_CHARACTERS_MAX = 4 * 1024 * 1024  # of an answer's text kept for taking it up again
THINKING_CHARACTERS_MAX = 1024 * 1024  # of a longer answer no thinking is kept
HELD_BYTES_MAX = 16 * 1024 * 1024  # more held than this is no answer of a sane model

EMPTY_ANSWER = "empty_answer"
CUT_CALL = "cut_call"  # the length limit came in the middle of a call's arguments
SCHEMA_CODES = frozenset({"unknown_tool", "missing_argument", "wrong_type"})


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
    signature: str = ""
    arguments: list[str] = msgspec.field(default_factory=list)
    repaired: str | None = None
    left_out: bool = False


class Gate:
    """Holds an attempt's frames until they may go downstream."""

    __slots__ = (
        "_forgiven",
        "_held",
        "_held_bytes",
        "_open",
        "_schemas",
        "_seals",
        "_thinking",
        "_whole",
        "altered",
        "calls",
        "characters",
        "ended",
        "finished",
        "passed",
        "progress",
        "repairs",
        "start",
        "started",
        "text",
        "usage",
    )

    def __init__(
        self, *, whole: bool, schemas: Callable[[], Schemas] | None = None, forgiven: Collection[str] = ()
    ) -> None:
        """``schemas`` gives those of the request's tools, asked for only when a call is made.

        ``forgiven``: codes out of ``SCHEMA_CODES``, ``CUT_CALL`` and ``EMPTY_ANSWER`` that make this answer no bad one.
        """
        self._whole = whole
        self._schemas = schemas
        self._forgiven = forgiven
        self.repairs = 0
        self.altered = False  # calls leave otherwise than the model wrote them
        self.passed: list[Frame] = []  # what the last ``admit`` gave, or was about to give when it raised
        self._open = False  # frames pass as they come
        self._held: list[Frame] = []
        self._held_bytes = 0
        self._thinking: dict[int, list[str]] = {}  # by block, like its seals
        self._seals: dict[int, tuple[str, str]] = {}  # the signature on it, or all of it sealed
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
        self.passed = passed = []
        characters, flowed = 0, False
        flowing = self._open and self.text and not self._held
        for frame in frames:
            events = frame.events
            if flowing and len(events) == 1 and type(event := events[0]) is TextDelta:
                characters += len(event.text)  # what most events are, at a third of the cost
                flowed = True
                passed.append(frame)
                continue
            self._admit_one(frame, passed)
            flowing = self._open and self.text and not self._held
        self.characters += characters
        self.progress = self.progress or flowed
        return passed

    def _admit_one(self, frame: Frame, passed: list[Frame]) -> None:
        if self.finished is not None and _only_fault(frame):
            return
        for event in frame.events:
            _FOLDS[type(event)](self, event)
        if self._open:
            passed += self._take(frame)
        else:
            self._hold(frame)

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
        return list(filter(None, map(self._mended, passed))) if self.altered else passed

    def _mended(self, frame: Frame) -> Frame | None:
        """The frame with repaired arguments in place of the model's, or None if nothing of it is left.

        A changed one has no bytes, so that it is encoded anew.
        """
        if not any(type(event) in (ToolStart, ToolDelta) for event in frame.events):
            return frame
        calls = {call.index: call for call in self.calls}
        events: list[Event] = []
        for event in frame.events:
            call = calls[event.index] if isinstance(event, ToolStart | ToolDelta) else None
            if call is None or (call.repaired is None and not call.left_out):
                events.append(event)
            elif isinstance(event, ToolStart) and call.repaired is not None:
                events += (event, ToolDelta(event.index, call.repaired))
        if events == list(frame.events):
            return frame
        return Frame(b"", tuple(events)) if events else None

    @property
    def sealed(self) -> bool:
        """True if there was thinking that its author sealed."""
        return bool(self._seals)

    def remembered(self, author: str) -> Remembered:
        """What a client may leave out when it sends this answer back as history."""
        whole = self.characters <= THINKING_CHARACTERS_MAX
        blocks = self._thinking.items() if whole else ()
        return Remembered(
            author,
            tuple(Reasoning("".join(texts), *self._seals.get(index, ())) for index, texts in blocks),
            self.finished.details if self.finished is not None else "",
            {call.id: call.signature for call in self.calls if call.signature and call.id},
        )

    # --- one method per kind of event -------------------------------------------------------------------------------

    def on_start(self, event: Start) -> None:
        self.start = self.start or event

    def on_text(self, event: TextDelta) -> None:
        if not self.text and event.text.isspace():
            self.characters += len(event.text)
            self.progress = True
            return
        self.text = True
        self._content(len(event.text))

    def on_reasoning(self, event: ReasoningDelta) -> None:
        self._content(len(event.text))
        texts = self._thinking.get(event.index)
        if texts is None:
            texts = self._thinking[event.index] = []
        if self.characters <= THINKING_CHARACTERS_MAX:
            texts.append(event.text)
        if event.signature or event.sealed:
            self._seals[event.index] = (event.signature, event.sealed)

    def _content(self, characters: int) -> None:
        self.characters += characters
        self.started = self.progress = True
        if not self._whole and not self.calls:
            self._open = True

    def on_tool_start(self, event: ToolStart) -> None:
        self.started = self.progress = True
        self._open = False
        self.calls.append(Call(event.index, event.id, event.name, event.signature))

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
            self._check_calls(cut=event.reason == "length")
        empty = not self.calls and not self.text and event.reason in ("stop", "tool_calls")
        if empty and EMPTY_ANSWER not in self._forgiven:
            raise BadAnswer(EMPTY_ANSWER)
        self.finished = event
        self.progress = True
        self._open = not self._whole

    def _check_calls(self, *, cut: bool) -> None:
        schemas = self._schemas() if self._schemas is not None else {}
        if any(not call.name for call in self.calls):
            raise BadAnswer("nameless_call")
        for call in self.calls:
            checked = check(call.name, "".join(call.arguments), schemas)
            code = CUT_CALL if cut and checked.code == BAD_ARGUMENTS else checked.code
            if code and code not in self._forgiven:
                raise BadAnswer(code)
            if code == CUT_CALL:
                call.left_out = self.altered = True
            if checked.repaired is not None:
                call.repaired = checked.repaired
                self.altered = True
                self.repairs += 1

    def on_end(self, event: End) -> None:  # noqa: ARG002 - every fold has the same shape
        self.ended = True

    def on_fault(self, event: Fault) -> None:
        raise InBandFault(event)


def _only_fault(frame: Frame) -> bool:
    return len(frame.events) == 1 and type(frame.events[0]) is Fault


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

    __slots__ = ("_spoken", "_text", "calls", "characters", "ended", "finished", "reasoning", "start")

    def __init__(self) -> None:
        self.start: Start | None = None
        self._text: list[str] = []
        self.characters = 0  # of text
        self._spoken = False  # text that is not blank
        self.reasoning = False
        self.calls = 0
        self.finished = False
        self.ended = False

    @property
    def committed(self) -> bool:
        """True once text or a call is with the client: what was said cannot be unsaid.

        Reasoning, and blank text behind it, can be begun anew.
        """
        return self._spoken or self.calls > 0

    @property
    def begun(self) -> bool:
        """True once anything at all of an answer is with the client."""
        return self.start is not None or self.reasoning or self.calls > 0 or self.characters > 0

    @property
    def text(self) -> str | None:
        """All the text the client has; None if it is more than is kept."""
        return "".join(self._text) if self.characters <= TEXT_CHARACTERS_MAX else None

    def fold(self, events: Iterable[Event]) -> None:
        texts: list[str] = []
        for event in events:
            kind = type(event)
            if kind is TextDelta:
                texts.append(event.text)  # type: ignore[union-attr]  # kind is checked above
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
        if texts:
            self._note("".join(texts))

    def _note(self, text: str) -> None:
        """One string for all that came at once: the memory of its pieces is free again at once."""
        self.characters += len(text)
        self._spoken = self._spoken or not text.isspace()
        if self.characters <= TEXT_CHARACTERS_MAX:
            self._text.append(text)
        else:
            self._text.clear()
