"""Framing of server-sent events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routerd.canonical import UpstreamProtocolError, UpstreamTruncated
from routerd.dialects.sse import BLOCK_BYTES_MAX, BODY, Block, Framer
from tests.dialects.streams import in_reads


def blocks(*reads: bytes) -> list[Block]:
    framer = Framer()
    return [block for data in reads for block in framer.feed(data)] + framer.finish()


@pytest.mark.parametrize(
    ("stream", "event", "data"),
    [
        (b"data: a\n\n", b"", b"a"),
        (b"data:a\n\n", b"", b"a"),
        (b"data:  a\n\n", b"", b" a"),
        (b"data: a: b\n\n", b"", b"a: b"),
        (b"data: a\ndata: b\n\n", b"", b"a\nb"),
        (b"data: a\ndata\ndata: b\n\n", b"", b"a\n\nb"),
        (b"event: ping\ndata: a\n\n", b"ping", b"a"),
        (b"data: a\nevent: ping\n\n", b"ping", b"a"),
        (b"event: ping\ndata: a\ndata: b\n\n", b"ping", b"a\nb"),
        (b"id: 7\nretry: 10\ndata: a\n\n", b"", b"a"),
        (b": comment\n\n", b"", b""),
        (b":\ndata: a\n\n", b"", b"a"),
        (b"\ndata: a\n\n", b"", b"a"),
        (b"\n\n", b"", b""),
        (b"data: a\r\n\r\n", b"", b"a"),
        (b"data: a\r\ndata: b\r\n\r\n", b"", b"a\nb"),
        (b"data: a\r\r", b"", b"a"),
        (b"data: a\n\r\n", b"", b"a"),
        (b"\xef\xbb\xbfdata: a\n\n", b"", b"a"),
        (b"\xef\xbb\xbf: a\r\ndata: b\r\n\r\n", b"", b"b"),
    ],
)
def test_one_block(stream: bytes, event: bytes, data: bytes) -> None:
    """The grammar, case by case, whole and one byte at a time."""
    expected = [Block(stream, event, data)]

    assert expected == blocks(stream)
    assert expected == blocks(*in_reads(stream, range(1, len(stream))))


_lines = st.sampled_from([b"data: x", b"data:", b"data: {}", b": ping", b"event: e", b"id: 1", b"", b""])
_streams = st.lists(st.tuples(_lines, st.sampled_from([b"\n", b"\r\n", b"\r"])), max_size=20).map(
    lambda lines: b"".join(line + end for line, end in lines)
)


@given(stream=_streams, data=st.data())
def test_cuts_do_not_matter(stream: bytes, data: st.DataObject) -> None:
    """Any stream in any reads gives the same blocks, and gives back its bytes."""
    stream += b"data: [DONE]\n\n"
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=10))
    expected = blocks(stream)

    assert stream == b"".join(block.raw for block in expected)
    assert expected == blocks(*in_reads(stream, cuts))


@given(stream=_streams)
def test_line_ends_do_not_matter(stream: bytes) -> None:
    """The quick way, for newlines only, and the general way agree on what a stream says."""
    plain = stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n") + b"data: [DONE]\n\n"
    windows = plain.replace(b"\n", b"\r\n")

    assert [(block.event, block.data) for block in blocks(plain)] == [
        (block.event, block.data) for block in blocks(windows)
    ]


def test_block_is_kept_until_whole() -> None:
    """Nothing of a block comes out before its blank line."""
    framer = Framer()

    assert framer.feed(b"data: a\n") == []
    assert [Block(b"data: a\n\n", b"", b"a")] == framer.feed(b"\ndata: b")


def test_line_in_many_reads() -> None:
    """A long line is put together again."""
    reads = [b"data: ", *[b"x" * 1000] * 50, b"\n", b"\n"]

    assert [Block(b"".join(reads), b"", b"x" * 50_000)] == blocks(*reads)


@pytest.mark.parametrize("rest", [b"data: [DONE]", b"data: [DONE]\n", b"data:[DONE]\r\n", b"data: [DONE]\r\n\r"])
def test_done_needs_no_blank_line(rest: bytes) -> None:
    """Some servers close right behind their marker."""
    assert [block.data for block in blocks(b"data: a\n\n", rest)] == [b"a", b"[DONE]"]


@pytest.mark.parametrize(
    "rest", [b"data: [DON", b"data: {}", b"data: {}\n", b"dat", b"event: x\n", b"event: x\ndata: y"]
)
def test_torn_block(rest: bytes) -> None:
    """Anything else without its blank line was torn."""
    with pytest.raises(UpstreamTruncated):
        blocks(b"data: a\n\n", rest)


@pytest.mark.parametrize(("rest", "raw"), [(b"\n", b"\n"), (b": ping\n", b": ping\n"), (b": pi", b"")])
def test_end_inside_a_comment(rest: bytes, raw: bytes) -> None:
    """A comment or a blank line tears nothing; half a comment is dropped."""
    assert b"data: a\n\n" + raw == b"".join(block.raw for block in blocks(b"data: a\n\n", rest))


@pytest.mark.parametrize("stream", [b"hello", b"\n <html>", b"\xff", b"data: a\n\nhello: b\n\n", b"data: a\nb\n\n"])
def test_not_an_event_stream(stream: bytes) -> None:
    """A line that no event stream has is an error, the first byte at once."""
    with pytest.raises(UpstreamProtocolError):
        Framer().feed(stream)


@pytest.mark.parametrize("body", [b'{"a": {"b": 1}}', b'\n\n[{"a": 1}]\n', b'\xef\xbb\xbf{"a":\r\n\r\n1}'])
def test_json_body(body: bytes) -> None:
    """A JSON body in place of a stream becomes one block, however it arrives."""
    assert [(BODY, body.strip(b"\xef\xbb\xbf\n"))] == [
        (block.event, block.data) for block in blocks(body) if block.data
    ]
    reads = in_reads(body, range(1, len(body)))
    assert body.rstrip() == b"".join(block.raw for block in blocks(*reads)).rstrip()
    assert [block.event for block in blocks(*reads) if block.data] == [BODY]


def test_torn_json_body() -> None:
    """A JSON body that ends too early was torn."""
    with pytest.raises(UpstreamTruncated):
        blocks(b'{"a": {"b": 1}')


@pytest.mark.parametrize("begin", [b"data: ", b": ", b'{"a": "', b"data: x\r\ndata: "])
def test_size_is_bounded(begin: bytes) -> None:
    """A block that never ends is given up."""
    with pytest.raises(UpstreamProtocolError, match="longer"):
        blocks(begin, *[b"x" * (BLOCK_BYTES_MAX // 8)] * 9)


def test_repr() -> None:
    """The state is visible, the content is not."""
    framer = Framer()
    framer.feed(b"data: secret")

    assert repr(framer) == "<Framer SSE pending 12 bytes>"
