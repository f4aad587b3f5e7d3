"""Joining a new attempt's answer to what the client already has, so that no byte is said twice.

Theory of operation
-------------------
The client has ``sent`` (text, nothing else of weight). A new attempt was made in one of three ways; each tells what its
text means:

* ``prefill``: the model went on writing a trailing assistant turn. Its text is the rest, unless the server repeats the
  whole turn first (some do): text that is still equal to ``sent`` from the start is held until it differs. The turn was
  given without its trailing white space, which some vendors refuse, so that may come once more.
* ``instructed``: the model was asked to go on. It may repeat the last words: the longest beginning of its text that is
  an ending of ``sent`` is cut, if it is ``OVERLAP_MIN`` long or longer; shorter ones are chance. Until ``HORIZON``
  characters (or the end) are there, all is held.
* ``rerun``: the unchanged request was made again and its whole answer is here. If it makes tool calls, they are sent
  alone: the text already sent stands for their preamble. If it is text that begins with ``sent``, the rest is sent.
  Anything else cannot be joined, and raises ``Diverged`` before anything is given out.

``Splice`` is fed events and gives back those to send. It never gives a ``Start``: there was one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from routerd.canonical import End, Event, Finish, ReasoningDelta, Start, TextDelta, ToolDelta, ToolStart, UsageReport

Manner = Literal["prefill", "instructed", "rerun"]

OVERLAP_MIN = 8
HORIZON = 240  # characters of an instructed continuation looked at for an overlap


class Diverged(Exception):
    """The new answer cannot be joined to the old one."""


class Splice:
    """One attempt's events, made to fit behind ``sent``."""

    __slots__ = ("_held", "_joined", "_manner", "_sent", "_text")

    def __init__(self, manner: Manner, sent: str) -> None:
        self._manner = manner
        self._sent = sent
        self._text = ""  # of the new attempt, until it is joined
        self._held: list[Event] = []
        self._joined = False

    def feed(self, events: Iterable[Event]) -> list[Event]:
        """Take events as they may be released; give those to send. Raises ``Diverged``."""
        given: list[Event] = []
        for event in events:
            given += self._one(event)
        return given

    def _one(self, event: Event) -> Sequence[Event]:
        kind = type(event)
        if kind is Start or (kind is ReasoningDelta and not self._joined):
            return ()
        if self._joined:
            return (event,)
        if kind is TextDelta:
            self._text += event.text  # type: ignore[union-attr]  # kind is checked above
            return self._try_join(last=False)
        if kind in (Finish, End, ToolStart, ToolDelta):
            return (*self._try_join(last=True), event) if self._manner != "rerun" else self._rerun(event)
        return (event,) if kind is UsageReport else ()

    def _try_join(self, *, last: bool) -> Sequence[Event]:
        if self._manner == "rerun":
            return ()
        rest = self._after_echo(last) if self._manner == "prefill" else self._after_overlap(last)
        if rest is None:
            return ()
        self._joined = True
        return (TextDelta(0, rest),) if rest else ()

    def _after_echo(self, last: bool) -> str | None:
        """The text without a repetition of all that was sent; None while that is still open."""
        given = self._sent.rstrip()
        space = self._sent[len(given) :]
        rest = self._text
        if rest.startswith(given):
            rest = rest[len(given) :]
        elif given.startswith(rest) and not last:
            return None
        if space.startswith(rest) and not last:
            return None
        return rest.removeprefix(space)

    def _after_overlap(self, last: bool) -> str | None:
        """The text without a repetition of the last words; None while more of it must be seen."""
        if len(self._text) < HORIZON and not last:
            return None
        if self._text.startswith(self._sent):
            return self._text[len(self._sent) :]
        return self._text[overlap(self._sent, self._text) :]

    def _rerun(self, event: Event) -> Sequence[Event]:
        """The first event that is not text decides, for the whole of a re-run is here before it is fed."""
        self._joined = True
        if type(event) is ToolStart:
            return (event,)
        if self._text.startswith(self._sent):
            rest = self._text[len(self._sent) :]
            return (TextDelta(0, rest), event) if rest else (event,)
        raise Diverged


def overlap(sent: str, text: str) -> int:
    """Length of the longest beginning of ``text`` that is an ending of ``sent``; 0 if it is too short to be meant."""
    for length in range(min(len(sent), len(text), HORIZON), OVERLAP_MIN - 1, -1):
        if sent.endswith(text[:length]):
            return length
    return 0
