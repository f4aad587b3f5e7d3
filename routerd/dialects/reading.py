"""What all decoders of streams do alike: cut blocks, and know at the end whether the answer was whole."""

from __future__ import annotations

from routerd.canonical import Frame, UpstreamTruncated
from routerd.dialects.sse import Block, Framer


class StreamDecoder:
    """The shape of a ``Decoder``. A dialect's own reads the blocks, and says when the model has given its end."""

    __slots__ = ("_finished", "_framer")

    def __init__(self) -> None:
        self._framer = Framer()
        self._finished = False

    def feed(self, data: bytes) -> list[Frame]:
        """See ``Decoder.feed``."""
        return self._frames(self._framer.feed(data))

    def close(self) -> list[Frame]:
        """See ``Decoder.close``. What is torn behind the model's own end (usage, a comment) is dropped."""
        try:
            frames = self._frames(self._framer.finish())
        except UpstreamTruncated:
            frames = []
            if not self._finished:
                raise
        if not self._finished:
            raise UpstreamTruncated("ended before the model had given its end")
        return frames

    def _frames(self, blocks: list[Block]) -> list[Frame]:
        raise NotImplementedError
