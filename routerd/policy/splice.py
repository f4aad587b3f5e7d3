"""Joining a new attempt's answer to what the client already has, so that no byte is said twice and none is left out.

Theory of operation
-------------------
The client has ``sent`` (text, nothing else of weight). A new attempt was made in one of three ways; each tells what its
text means:

* ``prefill``: the model went on writing a trailing assistant turn. Its text is the rest, unless the server gives the
  whole turn back first, as some do: that is cut off.
* ``instructed``: the model was asked to go on. It may repeat all that was sent, or the end of it: the longest beginning
  of its text that is an ending of ``sent`` is cut off, if it is long and varied enough to be meant. If nothing was
  missing it says ``COMPLETE``, which nobody else gets to see, here or at the end.
* ``rerun``: the unchanged request was made again and its whole answer is here. If its text begins with ``sent``, what
  follows is sent. Else, if it makes tool calls, they are sent alone: the text already sent stands for their preamble.
  Anything else cannot be joined, and raises ``Diverged`` before anything is given out.

A turn is handed over without its trailing white space, which some vendors refuse, so that may come once more: of the
white space at the seam, what both sides have counts once.

Text is held only as long as it may still turn out to be a repetition, that is while all of it stands in ``sent`` as
well. So how the text was cut into deltas makes no difference to the outcome, and little is held: a few words as a rule.

``Splice`` is fed events and gives back those to send. It never gives a ``Start``: there was one. A ``document`` (the
text as a whole must be JSON) has to be fed in one piece, and raises ``Diverged`` if the two parts do not make one.

What is ugly: a repetition of less than ``OVERLAP_MIN`` characters cannot be told from chance, so it stays, unless it is
of all that was sent: to begin anew is likelier than a stammer. And a model that goes on with the very words it ended
with (a refrain) loses them once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import msgspec

from routerd.canonical import (
    COMPLETE,
    End,
    Event,
    Finish,
    ReasoningDelta,
    Start,
    TextDelta,
    ToolDelta,
    ToolStart,
)

Manner = Literal["prefill", "instructed", "rerun"]

OVERLAP_MIN = 16  # characters; shorter repetitions are chance, a word or a cell that comes twice
OVERLAP_VARIETY_MIN = 6  # different letters or digits in it: rulers, brackets and blank lines repeat by nature
_CLOSING = frozenset(".!?…。！？)]}>\"'”’»`*|")  # noqa: RUF001 - full stops of other scripts are meant
LOOKBACK = 4096  # characters: an overlap that begins further back is found only if it begins at the very start


class Diverged(Exception):
    """The new answer cannot be joined to the old one."""


class Splice:
    """One attempt's events, made to fit behind ``sent``."""

    __slots__ = ("_document", "_joined", "_kept", "_manner", "_seam", "_sent", "_text")

    def __init__(self, manner: Manner, sent: str, *, document: bool = False) -> None:
        self._manner = manner
        self._seam = _Seam(sent, overlaps=manner == "instructed")
        self._sent = sent
        self._text = ""  # of the new attempt, until it is joined
        self._kept = ""  # of an instructed continuation: its end, while it may be the beginning of ``COMPLETE``
        self._joined = False
        self._document: list[str] | None = [sent] if document else None

    def __repr__(self) -> str:
        state = "joined" if self._joined else f"holding {len(self._text)} characters"
        return f"<Splice {self._manner} behind {len(self._sent)} characters, {state}>"

    def feed(self, events: Iterable[Event]) -> list[Event]:
        """Take events as they may be released; give those to send. Raises ``Diverged``."""
        given: list[Event] = []
        for event in events:
            given += self._one(event)
        return given

    def settle(self) -> list[Event]:
        """A call has begun, though it is held elsewhere. Give what is still held of the text in front of it."""
        return list(self._on_last_text(End())) if self._text or self._kept else []

    def _one(self, event: Event) -> Sequence[Event]:
        kind = type(event)
        if kind is TextDelta:
            return self._on_text(event.text)  # type: ignore[union-attr]  # kind is checked above
        if kind is Start or (kind is ReasoningDelta and not self._joined):
            return ()
        if kind in (Finish, End, ToolStart, ToolDelta):
            given = (*self._on_last_text(event), event)
            if kind is Finish and event.reason == "stop":  # type: ignore[union-attr]  # kind is checked above
                self._check_document()
            return given
        return (event,)

    def _on_text(self, text: str) -> Sequence[Event]:
        if self._joined:
            return self._said(text)
        self._text += text
        if self._manner == "rerun":
            return ()
        rest = self._seam.rest(self._text, last=False)
        return () if rest is None else self._join(rest)

    def _on_last_text(self, event: Event) -> Iterator[Event]:
        """No more text will come, or none that belongs to what was held so far."""
        if not self._joined:
            yield from self._join(self._rest_of_rerun(event) if self._manner == "rerun" else self._rest_at_last())
        if self._kept and self._kept.rstrip() != COMPLETE:
            yield self._text_event(self._kept)
        self._kept = ""

    def _rest_at_last(self) -> str:
        rest = self._seam.rest(self._text, last=True)
        assert rest is not None  # what is last is never left open  # noqa: S101
        return rest

    def _rest_of_rerun(self, event: Event) -> str:
        if self._text.startswith(self._sent):
            return self._text[len(self._sent) :]
        if type(event) is ToolStart:
            return ""
        raise Diverged

    def _join(self, rest: str) -> Sequence[Event]:
        self._joined = True
        self._text = ""
        return self._said(rest)

    def _said(self, text: str) -> Sequence[Event]:
        """Text to send, less its end while that may be the beginning of ``COMPLETE``."""
        if self._manner == "instructed":
            text = self._kept + text
            self._kept = _beginning_of_mark(text)
            text = text.removesuffix(self._kept)
        return (self._text_event(text),) if text else ()

    def _text_event(self, text: str) -> TextDelta:
        if self._document is not None:
            self._document.append(text)
        return TextDelta(0, text)

    def _check_document(self) -> None:
        if self._document is None:
            return
        try:
            msgspec.json.decode("".join(self._document), type=msgspec.Raw)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            raise Diverged from None


class _Seam:
    """Where the new text goes on from the old one."""

    __slots__ = ("_end", "_given", "_overlaps", "_space")

    def __init__(self, sent: str, *, overlaps: bool) -> None:
        self._given = sent.rstrip()  # what the model was shown
        self._space = sent[len(self._given) :]
        self._end = self._given[-LOOKBACK:]
        self._overlaps = overlaps

    def rest(self, text: str, *, last: bool) -> str | None:
        """The text without what it repeats; None while more of it must be seen to say. Never None for the ``last``."""
        open_still = self._given.startswith(text) or (self._overlaps and text in self._end)
        if open_still and not last:
            return None
        return self._after_space(text[self._repeated(text) :], last=last)

    def _repeated(self, text: str) -> int:
        """How many characters at the beginning of the text stand at the end of what was sent."""
        given = self._given
        if text.startswith(given):
            return len(given)
        return overlap(self._end, text) if self._overlaps else 0

    def _after_space(self, rest: str, *, last: bool) -> str | None:
        space = self._space
        if not space:
            return rest
        blank = len(rest) - len(rest.lstrip())
        if blank == len(rest) < len(space) and not last:
            return None
        repeated = max(length for length in range(min(blank, len(space)) + 1) if space.endswith(rest[:length]))
        return rest[repeated:]


def _is_meant(repeated: str) -> bool:
    """True if it is long and varied enough not to be chance."""
    return len(repeated) >= OVERLAP_MIN and len(set(filter(str.isalnum, repeated))) >= OVERLAP_VARIETY_MIN


def overlap(sent: str, text: str) -> int:
    """Length of the longest beginning of ``text`` that is an ending of ``sent``; 0 if it is too slight to be meant."""
    start = text[:OVERLAP_MIN]
    at = sent.find(start) if len(start) == OVERLAP_MIN else -1
    while at >= 0:
        if text.startswith(sent[at:]):
            return len(sent) - at if _is_meant(sent[at:]) else 0
        at = sent.find(start, at + 1)
    return 0


def _beginning_of_mark(text: str) -> str:
    """The ending of the text that ``COMPLETE`` may begin with, or is."""
    at = text.rfind(COMPLETE[0])
    return text[at:] if at >= 0 and COMPLETE.startswith(text[at:].rstrip()) else ""


def seems_whole(text: str) -> bool:
    """True if the text ends as texts end: then a second model that adds nothing to it is believed."""
    return text.rstrip()[-1:] in _CLOSING
