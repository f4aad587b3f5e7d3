"""Wire bytes <-> canonical events, one module per wire API.

A dialect is a module of this folder that exposes ``DIALECT``; the registry finds it by itself, and the contract tests
over the registry pick it up. Nothing here waits, connects or looks at a clock: decoders are given bytes and return
frames, encoders are given events and return bytes.

What a stream of events looks like, whichever dialect it came from: one ``Start``; then deltas, with each tool call
opened by exactly one ``ToolStart`` before its first ``ToolDelta``; then one ``Finish``, the last ``UsageReport`` after
it or before it, and one ``End``. A ``Fault`` may stand anywhere and makes the answer unfit for use. Indexes count the
blocks of their own kind, from zero. An answer can be whole without ``End``, never without ``Finish``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Protocol

import msgspec

from routerd.canonical import Event, Failure, Frame, Head, Recall, Request, Upstream

# What answers may have that there are no events for; the names are feature labels of routerd_dropped_features_total.
CITATIONS = "citations"
SERVER_TOOLS = "server_tools"  # what the vendor's own tools did
PICTURES = "pictures"
SPEECH = "speech"
CHOICES = "choices"  # all but the first
OTHER_CONTENT = "other_content"


class Stamp(msgspec.Struct, frozen=True):
    """What every piece of one answer carries. ``created`` is in Unix seconds."""

    id: str
    model: str
    created: int
    include_usage: bool = False  # chat: the client asked for the usage chunk
    asked: bytes = b""  # the client's request, for a dialect whose answers repeat some of it


class Decoder(Protocol):
    """Reads one attempt's stream. Its frames' ``raw``, joined, are the bytes it was fed.

    ``unsaid``: what the answer had that there are no events for, by name: it travels as bytes, or not at all.
    """

    @property
    def unsaid(self) -> set[str]: ...

    def feed(self, data: bytes) -> list[Frame]:
        """Return the frames that are now whole.

        Raises ``UpstreamProtocolError``, and nothing else, on bytes that are not this dialect; the frames of the same
        read go with them.
        """

    def close(self) -> list[Frame]:
        """The upstream is at its end: return the last frames. Raises ``UpstreamTruncated`` if the answer is not whole.

        An answer can be whole without its terminal marker; then no ``End`` was among the events, and whoever needs the
        marker downstream encodes one.
        """


class Encoder(Protocol):
    """Writes one exchange's stream; it outlives failovers, so it keeps ids and says its role only once.

    ``opened``: it has said something that an upstream's own bytes do not fit behind, so all that follows is encoded.
    """

    opened: bool

    def encode(self, event: Event) -> bytes:
        """Return the event in this dialect, ``b""`` when it has no form here (yet)."""

    def follow(self, frames: Iterable[Frame]) -> None:
        """Note what was sent on as it came: what is encoded later must fit behind it. Called if the dialect asks."""

    def keepalive(self) -> bytes:
        """Return a protocol event that says nothing: clients do not count comments as life."""

    def error(self, failure: Failure) -> bytes:
        """Return the failure as an in-protocol event. Nothing may follow it, least of all a terminal marker."""


class Recorder(Protocol):
    """Reads along what one client is sent, in its own dialect, until the end of an answer that can be gone on from."""

    def stream(self, data: bytes) -> tuple[str, bytes] | None:
        """``data``: whole events. Once the end is among them: the answer's id, and its items as a JSON array."""

    def body(self, data: bytes) -> tuple[str, bytes] | None:
        """The same of a whole answer."""


class Chaining(Protocol):
    """How clients of this API go on from an earlier answer by naming it instead of sending the conversation again.

    ``Head.previous`` and ``Head.kept`` say whether a request does, and whether its answer is to be gone on from.
    """

    def input_items(self, body: bytes) -> bytes:
        """What this request adds to the conversation, as a JSON array of items. Raises ``BadRequest``."""

    def chained(self, body: bytes, history: Sequence[bytes]) -> bytes:
        """The same request with the conversation in it, which it no longer names. Raises ``BadRequest``.

        ``history``: JSON arrays of items, oldest first.
        """

    def recorder(self) -> Recorder:
        """Return a recorder for one exchange."""


class Dialect(Protocol):
    """One wire API.

    ``forwarded_headers``: of the client's, in lower case, that go to an upstream which speaks the same dialect.
    ``key_header``: where this API's own vendor looks for the key; ``""`` for a bearer token.
    ``continuations``: the manners of ``Fix.continuation`` that can be said in this dialect; any can be ``instructed``.
    ``follows``: its encoders are to be shown what is sent on as it came.
    ``chaining``: None where every request brings the whole conversation.
    """

    name: str
    paths: tuple[str, ...]  # downstream
    count_paths: tuple[str, ...]  # downstream, where a request's tokens are counted
    upstream_path: str  # appended to a provider's base URL
    upstream_headers: ClassVar[dict[str, str]]  # of every request to an upstream
    forwarded_headers: tuple[str, ...]
    key_header: str
    continuations: frozenset[str]
    follows: bool
    chaining: Chaining | None

    def read_head(self, body: bytes) -> Head:
        """Read what routing needs. Raises ``BadRequest``."""

    def patch_request(self, body: bytes, head: Head, upstream: Upstream, recall: Recall | None = None) -> bytes:
        """Return a body that ``read_head`` accepted as this upstream wants it, in the same dialect.

        ``recall`` knows what the client may have left out of its history.
        ``head.stream`` decides whether the upstream is asked to stream; replaced, it can differ from the client's wish.
        """

    def decode_request(self, body: bytes) -> Request:
        """Read a whole request, to be written in another dialect. Raises ``BadRequest`` for what cannot cross."""

    def encode_request(self, request: Request) -> bytes:
        """Write a whole request; ``patch_request`` then fits it to an upstream."""

    def unsaid(self, request: Request) -> tuple[str, ...]:
        """Return what of the request has no place in this dialect, by name."""

    def tool_schemas(self, body: bytes) -> dict[str, dict[str, Any]]:
        """Return the JSON Schema of each offered tool's arguments, by name; empty where they cannot be read."""

    def continue_request(self, body: bytes, text: str, manner: str) -> bytes:
        """Return a request for the rest of an answer that broke off after ``text``; ``manner`` as in ``Fix``."""

    def decoder(self) -> Decoder:
        """Return a decoder for one attempt."""

    def encoder(self, stamp: Stamp) -> Encoder:
        """Return an encoder for one exchange."""

    def decode_body(self, body: bytes) -> list[Event]:
        """Read a whole answer as the events of a stream. Raises ``UpstreamProtocolError`` if it is not an answer.

        An error object inside a 200 is no protocol error but a lone ``Fault``.
        """

    def encode_body(self, events: Iterable[Event], stamp: Stamp) -> bytes:
        """Return a whole answer."""

    def encode_count(self, head: Head) -> bytes:
        """Return the answer to the question how many tokens a request has."""

    def encode_error(self, failure: Failure) -> bytes:
        """Return the body of an error response."""


def _found() -> Iterator[Dialect]:
    for module in pkgutil.iter_modules(__path__):
        dialect = getattr(importlib.import_module(f"{__name__}.{module.name}"), "DIALECT", None)
        if dialect is not None:
            yield dialect


DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in _found()}
