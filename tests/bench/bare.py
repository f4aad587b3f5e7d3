"""routerd with its recovery taken out: the plainest relay of the same proxy, to compare with what is served.

``python -m tests.bench.bare serve ...`` is the daemon, except that its gate and its transcript are stand-ins that look
only at what has to be known without any recovery: when the answer begins and ends, and its usage. Nothing is held,
checked or remembered. Everything else, from the sockets to the ledger, is the product's own code.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from routerd.__main__ import main
from routerd.canonical import Event, Frame, Start, TextDelta
from routerd.policy.transcript import Gate, Transcript
from routerd.proxy import downstream, exchange


class BareGate(Gate):
    """Lets everything pass at once."""

    def admit(self, frames: Iterable[Frame]) -> list[Frame]:
        passed = list(frames)
        self.progress = False
        for frame in passed:
            events = frame.events
            if events and type(events[0]) is TextDelta:
                self.progress = self.started = self.text = True
            else:
                self._look(events)
        self._held.clear()
        return passed

    def _look(self, events: Iterable[Event]) -> None:
        super().admit([Frame(b"", tuple(events))])


class BareTranscript(Transcript):
    """Knows that an answer has begun, and no more."""

    def fold(self, events: Iterable[Event]) -> None:
        if self.start is None:
            self.start = next((event for event in events if type(event) is Start), Start("", ""))


def strip() -> None:
    """From here on exchanges are made without recovery."""
    for module, name, bare in ((exchange, "Gate", BareGate), (downstream, "Transcript", BareTranscript)):
        assert hasattr(module, name)
        setattr(module, name, bare)


if __name__ == "__main__":
    strip()
    sys.exit(main())
