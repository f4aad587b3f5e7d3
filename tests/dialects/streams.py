"""Streams to test with: recordings, ways to cut them, and events as Hypothesis makes them up."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

from hypothesis import strategies as st

from routerd.canonical import (
    End,
    Event,
    Fault,
    Finish,
    FinishReason,
    Frame,
    ReasoningDelta,
    Start,
    TextDelta,
    ToolDelta,
    ToolStart,
    Usage,
    UsageReport,
)
from routerd.dialects import Dialect, Stamp

RECORDINGS = Path(__file__).parent.parent / "recordings"
STAMP = Stamp("resp_answer-1", "auto", 1_763_680_000, include_usage=True)


def recordings(dialect: Dialect) -> list[Path]:
    """Whole answers as vendors send them."""
    return sorted((RECORDINGS / dialect.name).glob("*.sse"))


def torn_recordings(dialect: Dialect) -> list[Path]:
    """Answers that broke off or report an error."""
    return sorted((RECORDINGS / dialect.name / "torn").glob("*.sse"))


def in_reads(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    places = [0, *sorted(cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(places)]


def decode(dialect: Dialect, *reads: bytes) -> list[Frame]:
    decoder = dialect.decoder()
    frames = [frame for data in reads for frame in decoder.feed(data)]
    return frames + decoder.close()


def feed(dialect: Dialect, *reads: bytes) -> list[Frame]:
    decoder = dialect.decoder()
    return [frame for data in reads for frame in decoder.feed(data)]


def events_of(frames: Iterable[Frame]) -> list[Event]:
    return [event for frame in frames for event in frame.events]


def raw_of(frames: Iterable[Frame]) -> bytes:
    return b"".join(frame.raw for frame in frames)


def encode(dialect: Dialect, events: Iterable[Event], stamp: Stamp = STAMP) -> bytes:
    encoder = dialect.encoder(stamp)
    return b"".join([encoder.encode(event) for event in events])


def merged(events: Iterable[Event]) -> list[Event]:
    """The same answer with neighbouring deltas of a block joined, as a whole body has it."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        match last, event:
            case (TextDelta(), TextDelta()) if last.index == event.index:
                result[-1] = TextDelta(event.index, last.text + event.text)
            case (ReasoningDelta(), ReasoningDelta()) if last.index == event.index:
                result[-1] = ReasoningDelta(event.index, last.text + event.text)
            case (ToolDelta(), ToolDelta()) if last.index == event.index:
                result[-1] = ToolDelta(event.index, last.arguments + event.arguments)
            case _:
                result.append(event)
    return result


def is_well_formed(events: list[Event]) -> bool:
    """The grammar of a whole answer."""
    kinds = [type(event) for event in events]
    opened = [event.index for event in events if type(event) is ToolStart]
    deltas_in_order = all(
        any(type(earlier) is ToolStart and earlier.index == event.index for earlier in events[:place])
        for place, event in enumerate(events)
        if type(event) is ToolDelta
    )
    return (
        kinds[0] is Start
        and kinds.count(Start) == kinds.count(Finish) == 1
        and End not in kinds[:-1]
        and Fault not in kinds
        and opened == list(range(len(opened)))
        and deltas_in_order
    )


_texts = st.lists(st.text(min_size=1, max_size=20), max_size=4)
_identities = st.from_regex(r"call_[A-Za-z0-9]{1,12}", fullmatch=True)
_names = st.from_regex(r"[a-z_][a-z0-9_]{0,15}", fullmatch=True)
_arguments = st.dictionaries(st.text(max_size=8), st.text(max_size=8) | st.integers() | st.booleans(), max_size=3)


@st.composite
def _usages(draw: st.DrawFn) -> Usage:
    prompt, output = draw(st.integers(0, 2_000_000)), draw(st.integers(0, 200_000))
    return Usage(prompt, draw(st.integers(0, prompt)), output, draw(st.integers(0, output)))


@st.composite
def answers(draw: st.DrawFn) -> list[Event]:
    """Whole answers: reasoning, then text, then tool calls, with a fitting finish."""
    events: list[Event] = [Start(STAMP.id, STAMP.model)]
    events += [ReasoningDelta(0, text) for text in draw(_texts)]
    events += [TextDelta(0, text) for text in draw(_texts)]
    calls = draw(st.lists(st.tuples(_identities, _names, _arguments), max_size=3, unique_by=lambda call: call[0]))
    for index, (identity, name, arguments) in enumerate(calls):
        text = json.dumps(arguments, ensure_ascii=draw(st.booleans()))
        cut = draw(st.integers(0, len(text)))
        events.append(ToolStart(index, identity, name))
        events += [ToolDelta(index, piece) for piece in (text[:cut], text[cut:]) if piece]
    plain: list[FinishReason] = ["stop", "length", "content_filter"]
    events.append(Finish("tool_calls" if calls else draw(st.sampled_from(plain))))
    events.append(UsageReport(draw(_usages())))
    return [*events, End()]
