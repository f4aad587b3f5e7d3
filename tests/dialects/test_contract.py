"""What every dialect owes, over all that are registered."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from routerd.canonical import (
    BadRequest,
    End,
    Event,
    Failure,
    Fault,
    Finish,
    Head,
    Outcome,
    Side,
    Start,
    TextDelta,
    UpstreamProtocolError,
    UpstreamTruncated,
    UsageReport,
)
from routerd.dialects import DIALECTS, Dialect, Stamp
from tests.dialects.streams import (
    STAMP,
    answers,
    decode,
    encode,
    events_of,
    feed,
    in_reads,
    is_well_formed,
    merged,
    raw_of,
    recordings,
    torn_recordings,
)

ALL = [pytest.param(dialect, id=name) for name, dialect in DIALECTS.items()]
RECORDED = [
    pytest.param(dialect, path, id=f"{dialect.name}/{path.stem}")
    for dialect in DIALECTS.values()
    for path in recordings(dialect)
]
TORN = [
    pytest.param(dialect, path, id=f"{dialect.name}/{path.stem}")
    for dialect in DIALECTS.values()
    for path in torn_recordings(dialect)
]
FAILURE = Failure(Outcome.UNAVAILABLE, Side.ROUTER, "no upstream could answer", status=503)
every_dialect = pytest.mark.parametrize("dialect", ALL)
every_recording = pytest.mark.parametrize(("dialect", "path"), RECORDED)


@every_dialect
def test_has_recordings(dialect: Dialect) -> None:
    """No dialect goes without answers in the form vendors really send."""
    assert recordings(dialect)
    assert torn_recordings(dialect)


def test_paths_are_distinct() -> None:
    """A downstream path names one dialect."""
    paths = [path for dialect in DIALECTS.values() for path in dialect.paths]

    assert sorted(set(paths)) == sorted(paths)


# --- decoding ---------------------------------------------------------------------------------------------------------


@every_recording
def test_recording_is_a_whole_answer(dialect: Dialect, path: Path) -> None:
    """Every recording obeys the grammar of events."""
    assert is_well_formed(events_of(decode(dialect, path.read_bytes())))


@every_recording
def test_raw_is_the_input(dialect: Dialect, path: Path) -> None:
    """The frames' bytes, joined, are what came in."""
    data = path.read_bytes()

    assert data == raw_of(decode(dialect, data))


@every_recording
def test_byte_at_a_time(dialect: Dialect, path: Path) -> None:
    """One byte per read gives the same frames as one read."""
    data = path.read_bytes()

    assert decode(dialect, data) == decode(dialect, *in_reads(data, range(1, len(data))))


@every_recording
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_reads(dialect: Dialect, path: Path, data: st.DataObject) -> None:
    """Where the stream is cut into reads changes nothing."""
    stream = path.read_bytes()
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12))

    assert decode(dialect, stream) == decode(dialect, *in_reads(stream, cuts))


@every_recording
def test_cut_before_the_finish_is_truncated(dialect: Dialect, path: Path) -> None:
    """However much of an answer has come, without the model's finish it is not whole."""
    data = path.read_bytes()
    frames = decode(dialect, data)
    finish = next(place for place, frame in enumerate(frames) if any(type(event) is Finish for event in frame.events))
    last_start = len(raw_of(frames[:finish]))

    for length in range(0, last_start + len(frames[finish].raw) - 4, 7):
        with pytest.raises(UpstreamTruncated):
            decode(dialect, data[:length])


@pytest.mark.parametrize(("dialect", "path"), TORN)
def test_torn_recording_is_never_whole(dialect: Dialect, path: Path) -> None:
    """A stream that broke off, or reports an error, does not close as an answer."""
    with pytest.raises(UpstreamTruncated):
        decode(dialect, path.read_bytes())


@pytest.mark.parametrize(("dialect", "path"), TORN)
def test_torn_recording_never_lets_an_end_out(dialect: Dialect, path: Path) -> None:
    """No terminal marker can reach a client whose answer is not whole."""
    assert End() not in events_of(feed(dialect, path.read_bytes()))


@every_dialect
@given(data=st.lists(st.binary(max_size=60), max_size=5))
def test_garbage(dialect: Dialect, data: list[bytes]) -> None:
    """Bytes of any kind raise a protocol error or are told to be no answer, and raise nothing else."""
    with pytest.raises(UpstreamProtocolError):
        decode(dialect, *data)


_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@every_dialect
@given(data=st.lists(st.binary(max_size=60) | _json.map(lambda value: json.dumps(value).encode()), max_size=4))
def test_garbage_in_events(dialect: Dialect, data: list[bytes]) -> None:
    """The same for anything inside well-formed events."""
    with pytest.raises(UpstreamProtocolError):
        decode(dialect, *[b"data: " + text + b"\n\n" for text in data])


@every_recording
@settings(max_examples=60)
@given(data=st.data())
def test_damage(dialect: Dialect, path: Path, data: st.DataObject) -> None:
    """One damaged byte in a recording raises a protocol error or nothing."""
    stream = bytearray(path.read_bytes())
    stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))

    try:
        frames = decode(dialect, bytes(stream))
    except UpstreamProtocolError:
        return
    assert bytes(stream).startswith(raw_of(frames))


@every_dialect
@pytest.mark.parametrize("depth", [100_000])
def test_deep_nesting(dialect: Dialect, depth: int) -> None:
    """JSON nested too deep is a protocol error, not a crash."""
    for opening in (b'{"a":' + b"[" * depth, b'{"a":' + b"[" * depth + b"]" * depth + b"}"):
        with pytest.raises(UpstreamProtocolError):
            decode(dialect, b"data: " + opening + b"\n\n")


@every_dialect
@pytest.mark.parametrize("page", [b"<!DOCTYPE html><html>", b" \n<html>", b"upstream connect error"])
def test_page_in_place_of_a_stream(dialect: Dialect, page: bytes) -> None:
    """An HTML page or a sentence is recognised by its first byte, long before the upstream hangs up."""
    with pytest.raises(UpstreamProtocolError):
        feed(dialect, page)


@every_dialect
def test_error_body_in_place_of_a_stream(dialect: Dialect) -> None:
    """A JSON error where a stream should be is evidence, not garbage."""
    (frame,) = feed(dialect, b'{"error": {"message": "slow down",', b' "code": 429}}\n')

    assert (Fault(429, "429", "slow down"),) == frame.events


@every_dialect
def test_empty_stream(dialect: Dialect) -> None:
    """Nothing at all is not an answer."""
    with pytest.raises(UpstreamTruncated):
        decode(dialect)


# --- encoding ---------------------------------------------------------------------------------------------------------


@every_dialect
@given(events=answers())
def test_round_trip(dialect: Dialect, events: list[Event]) -> None:
    """What is encoded decodes to the same events."""
    assert events == events_of(decode(dialect, encode(dialect, events)))


@every_dialect
@given(events=answers())
def test_body_round_trip(dialect: Dialect, events: list[Event]) -> None:
    """A whole answer carries the same events, each block in one piece."""
    body = dialect.encode_body(events, STAMP)

    assert merged(events) == dialect.decode_body(body)


@every_recording
def test_recording_encoded_anew(dialect: Dialect, path: Path) -> None:
    """A vendor's answer keeps its content when it is encoded in our own form."""
    events = events_of(decode(dialect, path.read_bytes()))
    told = [event for event in events if type(event) not in (Start, UsageReport, End)]

    again = events_of(decode(dialect, encode(dialect, [*events, End()])))

    assert told == [event for event in again if type(event) not in (Start, UsageReport, End)]


@every_dialect
def test_second_start(dialect: Dialect) -> None:
    """After a failover another upstream starts too; the client hears of one start."""
    encoder = dialect.encoder(STAMP)
    first = encoder.encode(Start("a", "m"))

    assert first
    assert encoder.encode(Start("b", "n")) == b""


@every_dialect
def test_usage_only_if_asked_for(dialect: Dialect) -> None:
    """A stream that may not carry usage still ends properly."""
    events: list[Event] = [Start("resp_a", "m"), TextDelta(0, "hi"), Finish("stop"), End()]
    stamp = Stamp("resp_a", "m", 1, include_usage=False)

    assert events == events_of(decode(dialect, encode(dialect, events, stamp)))


@every_dialect
@pytest.mark.parametrize("place", range(4))
def test_keepalive_says_nothing(dialect: Dialect, place: int) -> None:
    """A keep-alive can stand anywhere before the finish and adds no event."""
    events: list[Event] = [Start(STAMP.id, STAMP.model), TextDelta(0, "a"), TextDelta(0, "b"), Finish("stop"), End()]
    encoder = dialect.encoder(STAMP)
    pieces = [encoder.encode(event) for event in events]
    pieces.insert(place, encoder.keepalive())

    assert events == events_of(decode(dialect, *pieces))


@every_dialect
def test_keepalive_is_an_event(dialect: Dialect) -> None:
    """Clients do not count comments as life."""
    assert b"\ndata: " in b"\n" + dialect.encoder(STAMP).keepalive()


@every_dialect
def test_error_is_in_protocol_and_last(dialect: Dialect) -> None:
    """A client reads a failure as an error, and the stream is not whole."""
    encoder = dialect.encoder(STAMP)
    stream = encoder.encode(Start("a", "m")) + encoder.encode(TextDelta(0, "hi")) + encoder.error(FAILURE)

    fault = events_of(feed(dialect, stream))[-1]
    assert isinstance(fault, Fault)
    assert FAILURE.detail == fault.message
    with pytest.raises(UpstreamTruncated):
        decode(dialect, stream)


@every_dialect
def test_error_body_is_a_fault(dialect: Dialect) -> None:
    """An error body, met inside a 200, is a fault and never an answer."""
    (fault,) = dialect.decode_body(dialect.encode_error(FAILURE))

    assert isinstance(fault, Fault)
    assert FAILURE.detail == fault.message


@every_dialect
@given(body=st.binary(max_size=60) | _json.map(lambda value: json.dumps(value).encode()))
def test_garbage_body(dialect: Dialect, body: bytes) -> None:
    """A body that is no answer raises a protocol error or is a lone fault."""
    try:
        events = dialect.decode_body(body)
    except UpstreamProtocolError:
        return
    assert [Fault] == [type(event) for event in events]


@every_dialect
def test_count(dialect: Dialect) -> None:
    """The number of tokens is said in JSON."""
    told = json.loads(dialect.encode_count(Head("m", False, False, False, False, None, 17, 0)))

    assert 17 in told.values()


# --- requests ---------------------------------------------------------------------------------------------------------


@every_dialect
@given(body=st.binary(max_size=60) | _json.map(lambda value: json.dumps(value).encode()))
def test_garbage_request(dialect: Dialect, body: bytes) -> None:
    """A request that is none is refused in words, with a status of the client's side."""
    with pytest.raises(BadRequest) as refused:
        dialect.read_head(body)

    assert refused.value.failure.status == 400
    assert Side.CLIENT is refused.value.failure.side
    assert msgspec.json.decode(dialect.encode_error(refused.value.failure))
