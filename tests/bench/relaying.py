"""What recovery does to each event of a healthy stream, timed in this process by calling it.

The same stream, as an upstream sends it, goes again and again through what a relay runs for it: the decoder, the gate,
the fold into the transcript, what the encoder has to follow, and the joining of the bytes. Once with the product's own
gate and transcript, once with the bare ones (see ``bare``). The difference, in CPU time, is what recovery costs; no
socket and no loop is in it. Both ways take turns, so a change of the processor's pace hits both.

Also counted: text that was not given back by the same call that brought it. It is what recovery would add in delay.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

from routerd.canonical import Frame, TextDelta
from routerd.dialects import DIALECTS, Dialect, Stamp
from routerd.policy.transcript import Gate, Transcript
from tests.bench.bare import BareGate, BareTranscript
from tests.bench.bodies import FORMS, Body
from tests.bench.scenarios import Figures
from tests.wires import WIRES, Said

EVENTS = 1000
READS = {"alone": 1, "burst": 256}  # events per read: at an agent's pace; from a saturated loop
BATCHES = 9
OURS = "routerd"
STAMP = Stamp("bench", "mock", 1_750_000_000, include_usage=True)
WORDS = "the quick brown fox jumps over the lazy dog and then "


def measure() -> dict[str, dict[str, list[Figures]]]:
    """Scenario -> routerd -> batches, as the other scenarios give their rounds."""
    kinds = [(name, reads) for name in WIRES if name in FORMS for reads in READS]
    return {f"relay_{name}_{reads}": {OURS: batches(DIALECTS[name], READS[reads])} for name, reads in kinds}


def batches(dialect: Dialect, per_read: int) -> list[Figures]:
    """Microseconds per event, and how many events were held, of each batch."""
    reads = stream(dialect, per_read)
    schemas = functools.cache(lambda: dialect.tool_schemas(Body("tools", tools=20).encode("mock")))
    found: list[Figures] = []
    for _ in range(BATCHES):
        bare_s = spent_s(dialect, BareGate(whole=False), BareTranscript(), reads)
        full_s = spent_s(dialect, Gate(whole=False, schemas=schemas), Transcript(), reads)
        held = float(held_texts(dialect, Gate(whole=False, schemas=schemas), reads))
        found.append({"bare_us": 1e6 * bare_s / EVENTS, "us": 1e6 * (full_s - bare_s) / EVENTS, "held": held})
    return found


def stream(dialect: Dialect, per_read: int) -> list[bytes]:
    """A healthy answer of words, as its reads."""
    said = Said(tuple((WORDS * 2)[place % 50 :][:80] for place in range(EVENTS)))
    chunks = [chunk.data for chunk in WIRES[dialect.name].stream(said)]
    return [b"".join(chunks[place : place + per_read]) for place in range(0, len(chunks), per_read)]


def spent_s(dialect: Dialect, gate: Gate, transcript: Transcript, reads: Sequence[bytes]) -> float:
    """CPU seconds to relay the stream once."""
    begun_s = time.thread_time()
    relay(dialect, gate, transcript, reads)
    return time.thread_time() - begun_s


def relay(dialect: Dialect, gate: Gate, transcript: Transcript, reads: Sequence[bytes]) -> int:
    """The part of an exchange that is run for every read, without its sockets. Returns the bytes given out."""
    decoder, encoder, size = dialect.decoder(), dialect.encoder(STAMP), 0
    for data in reads:
        frames = gate.admit(decoder.feed(data))
        raws = [frame.raw for frame in frames]
        if dialect.follows:
            encoder.follow(frames)
        transcript.fold([event for frame in frames for event in frame.events])
        size += len(b"".join(raws))
    return size


def held_texts(dialect: Dialect, gate: Gate, reads: Sequence[bytes]) -> int:
    """How many pieces of text were not given out by the call that brought them."""
    decoder, late = dialect.decoder(), 0
    for data in reads:
        frames = decoder.feed(data)
        late += max(0, texts(frames) - texts(gate.admit(frames)))
    return late


def texts(frames: Sequence[Frame]) -> int:
    return sum(type(event) is TextDelta for frame in frames for event in frame.events)
