"""Server-sent events: bytes -> whole blocks.

Theory of operation
-------------------
A block is everything up to and including a blank line. A block is handed out only when it is whole, so a torn one can
never travel on; joined, the blocks' raw bytes are the input, and where the input was cut into reads does not matter.

Two ways through the same grammar:

* no carriage return in the buffer, which is every large vendor: one ``split`` on two newlines, and a block that is one
  ``data:`` line (or an ``event:`` line and a ``data:`` line) is taken apart by slicing;
* anything else: the WHATWG rules (three kinds of line end, comments, several data lines, a byte order mark).

Stricter than the standard in one point: a line with an unknown field name is an error, not ignored. No model server
sends one, but a proxy in front of it does, when it puts an HTML page or a plain sentence into a 200. The first byte
that is not blank is judged at once, without waiting for a blank line that may never come.

A server that answers a streaming request with a JSON body (most often an error) is given the benefit of the doubt: the
body becomes one block named ``BODY``, and the dialect says whether it is an error it knows.

What is ugly: after a lone ``\\r`` a ``\\n`` may still follow, so in a stream whose only line end is ``\\r`` every block
is one byte late. And a server may end without the last blank line: ``finish`` accepts that for ``data: [DONE]`` only.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from routerd.canonical import UpstreamProtocolError, UpstreamTruncated

BLOCK_BYTES_MAX: Final = 8 * 1024 * 1024  # a larger block is no event of a sane model
BODY: Final = b"(body)"  # the name of the block a JSON body becomes
DONE: Final = b"[DONE]"

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NEWLINE, _CARRIAGE_RETURN = b"\n\r"  # as numbers: the quickest thing to look for in bytes
_BLANK = b"\xef\xbb\xbf \t\r\n"
_FIRST_BYTES = b":deir"  # of a comment, data, event, id, retry
_JSON_FIRST_BYTES = b"{["
_IGNORED_FIELDS = frozenset({b"", b"id", b"retry"})
_BLOCK_END = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r(?=[^\n]))")


class Block(msgspec.Struct, frozen=True, gc=False):
    """``raw``: the bytes as they came. ``event``: its name or ``b""``. ``data``: its data lines, ``b""`` if none."""

    raw: bytes
    event: bytes
    data: bytes


class Framer:
    """Cuts one stream into blocks. Raises ``UpstreamProtocolError`` on what is not SSE, and is spent after that."""

    __slots__ = ("_begun", "_body", "_pending", "_pending_bytes")

    def __init__(self) -> None:
        self._pending: list[bytes] = []  # of a block that is not whole yet
        self._pending_bytes = 0
        self._begun = False  # the first byte that is not blank has been judged
        self._body = False

    def __repr__(self) -> str:
        return f"<Framer {'BODY' if self._body else 'SSE'} pending {self._pending_bytes} bytes>"

    def feed(self, data: bytes) -> list[Block]:
        """Return the blocks that ``data`` makes whole."""
        if self._pending:
            if self._begun and not self._body and _NEWLINE not in data and _CARRIAGE_RETURN not in data:
                self._keep(data)  # a long line in many reads: joined once, not once per read
                return []
            data = self._take() + data
        if not self._begun:
            self._begin(data)
        if self._body:
            return self._feed_body(data)
        if _CARRIAGE_RETURN in data:
            return self._feed_any(data)
        pieces = data.split(b"\n\n")
        rest = pieces.pop()
        if rest:
            self._keep(rest)
        return [  # the commonest block is taken apart in place: a call would cost as much again
            Block(piece + b"\n\n", b"", piece[6:])
            if piece[:6] == b"data: " and _NEWLINE not in piece
            else _parse_piece(piece)
            for piece in pieces
        ]

    def finish(self) -> list[Block]:
        """Return what the end of input makes whole. Raises ``UpstreamTruncated`` if it tore a block."""
        rest = self._take()
        if not rest.strip(_BLANK):
            return [Block(rest, b"", b"")] if rest else []
        if self._body:
            raise UpstreamTruncated("ended inside a JSON body")
        try:
            block = _parse(rest)
        except UpstreamProtocolError:
            raise UpstreamTruncated("ended inside an event") from None
        if _with_newlines(rest).endswith(b"\n\n") or (block.data == DONE and not block.event):
            return [block]
        if block.data or block.event:
            raise UpstreamTruncated("ended inside an event")
        return [block] if rest.endswith((b"\n", b"\r")) else []  # half a comment is worth nothing

    def _begin(self, data: bytes) -> None:
        text = data.lstrip(_BLANK)
        if text:
            self._begun = True
            self._body = text[0] in _JSON_FIRST_BYTES
            if not self._body and text[0] not in _FIRST_BYTES:
                raise UpstreamProtocolError("not an event stream")

    def _feed_any(self, data: bytes) -> list[Block]:
        """Cut at every blank line, whatever its line ends are."""
        blocks, start = [], 0
        for match in _BLOCK_END.finditer(data):
            blocks.append(_parse(data[start : match.end()]))
            start = match.end()
        if start < len(data):
            self._keep(data[start:])
        return blocks

    def _feed_body(self, data: bytes) -> list[Block]:
        text = data.strip(_BLANK)
        if text.endswith((b"}", b"]")) and _is_json(text):
            return [Block(data, BODY, text)]
        self._keep(data)
        return []

    def _keep(self, data: bytes) -> None:
        self._pending.append(data)
        self._pending_bytes += len(data)
        if self._pending_bytes > BLOCK_BYTES_MAX:
            raise UpstreamProtocolError(f"an event longer than {BLOCK_BYTES_MAX} bytes")

    def _take(self) -> bytes:
        pending = self._pending
        data = pending[0] if len(pending) == 1 else b"".join(pending)
        self._pending = []
        self._pending_bytes = 0
        return data


def _parse_piece(piece: bytes) -> Block:
    """Take apart a block that has no carriage return and has lost its blank line."""
    if piece[:7] == b"event: ":
        name, _, rest = piece[7:].partition(b"\n")
        if rest[:6] == b"data: " and _NEWLINE not in rest:
            return Block(piece + b"\n\n", name, rest[6:])
    return _parse(piece + b"\n\n")


def _parse(raw: bytes) -> Block:
    event, data = b"", []
    for line in _with_newlines(raw.removeprefix(_BYTE_ORDER_MARK)).split(b"\n"):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            event = value
        elif field not in _IGNORED_FIELDS:
            raise UpstreamProtocolError("a line that is not of an event stream")
    return Block(raw, event, b"\n".join(data))


def _with_newlines(text: bytes) -> bytes:
    return text.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in text else text


def _is_json(text: bytes) -> bool:
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True
