"""The tasks of a drill, as data: what goes wrong and when, what the agent asks, and what the model says.

A task is a short conversation as agents have them, in ``TURNS`` turns: a question, to which the model says a few words
and calls two tools; their results, which it puts into a text; one more question, to which it calls two tools without a
word. So every fault meets texts, calls, and texts in front of calls.

There are two upstreams, ``a`` and ``b``, with a wording of their own for the same answer, and the same calls. Like
models they go on with the other's text when they are asked to, and like models they sometimes repeat part of it.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from typing import Literal

import msgspec

from routerd.canonical import COMPLETE, Message, Request, Text, Tool, ToolCall, ToolResult
from routerd.proxy.laws import Called, Read, Saying
from routerd.proxy.scripts import (
    PLACED_KINDS,
    PLACES,
    Answer,
    Call,
    Fault,
    Kind,
    Place,
    Received,
    Turn,
    gone_on_with,
    shown_text,
)

TURNS = 3
HEALTHY_EACH = 4  # tasks in which nothing goes wrong, of each way: the measure of all others
PAUSE_S = 0.15  # far below any watchdog's limit
REFUSE_S = 0.3  # a port that is closed once stays closed for so long
MODEL = "drill"
MAX_OUTPUT_TOKENS = 128
TOOL_NAME = "terminal"
SCHEMA = (
    b'{"type":"object","properties":{"command":{"type":"string"},"line":{"type":"integer"}},"required":["command"]}'
)

CALL_TURNS = (0, 2)  # those in which tools are called
TEXT_TURNS = (0, 1)
IN_CALLS: tuple[Place, ...] = ("mid_call", "between_calls")
IN_TEXTS: tuple[Place, ...] = ("in_reasoning", "mid_text")
ONLY_IN_CALLS: tuple[Kind, ...] = ("bad_arguments", "cut_arguments", "length")  # in a text they would be no fault
PLACE_NAMES: dict[Place, str] = {place: place.replace("_", " ") for place in PLACES}

Pattern = Literal["never", "once", "always"]
Delivery = Literal["live", "whole"]
Who = Literal["a", "b"]
WAYS: tuple[tuple[Delivery, bool], ...] = (("live", True), ("live", False), ("whole", True), ("whole", False))

# --- what goes wrong ------------------------------------------------------------------------------------------------


class Trouble(msgspec.Struct, frozen=True):
    """A fault under the name it has in the table. ``place``: as it is told; empty if it means nothing."""

    name: str
    fault: Fault | None
    place: str = ""

    def turns(self) -> tuple[int, ...]:
        """The turns in which it is a fault."""
        if self.fault is None:
            return ()
        if self.fault.kind in ONLY_IN_CALLS or (self.fault.kind in PLACED_KINDS and self.fault.place in IN_CALLS):
            return CALL_TURNS
        if self.fault.kind in PLACED_KINDS and self.fault.place in IN_TEXTS:
            return TEXT_TURNS
        return tuple(range(TURNS))

    @property
    def refuses(self) -> bool:
        """True if it is no answer that is wrong: there is nobody."""
        return self.fault is not None and self.fault.kind == "refuse"

    @property
    def waits(self) -> bool:
        """True if it costs time rather than work."""
        return self.fault is not None and self.fault.kind in ("stall", "pause")


def _status(status: int, **headers: str) -> Fault:
    return Fault("status", status=status, headers=tuple(headers.items()))


HEALTHY = Trouble("no fault", None)
_PLACED: dict[str, Kind] = {
    "stall": "stall",
    "pause, then on": "pause",
    "reset (RST)": "reset",
    "torn (short FIN)": "tear",
    "ends unfinished": "eof",
    "error in band": "error",
    "malformed event": "malformed",
}
_WHOLE: dict[str, Fault] = {
    "connection refused": Fault("refuse"),
    **{str(status): _status(status) for status in (401, 402, 403, 404, 413)},
    "429": Fault("status", status=429, headers=(("retry-after", "1"),)),
    "429, no time": _status(429),
    **{str(status): _status(status) for status in (500, 503, 529)},
    "no headers": Fault("stall", "before_headers"),
    "HTML": Fault("html"),
    "error in a 200": Fault("json_error"),
    "empty stream": Fault("empty"),
    "empty answer": Fault("empty_content"),
    "bad arguments": Fault("bad_arguments"),
    "cut arguments": Fault("cut_arguments"),
    "cut by length": Fault("length"),
}
TROUBLES: tuple[Trouble, ...] = (
    *(Trouble(name, fault) for name, fault in _WHOLE.items()),
    *(
        Trouble(name, Fault(kind, place, seconds=PAUSE_S), PLACE_NAMES[place])
        for name, kind in _PLACED.items()
        for place in PLACES
        if (kind, place) != ("stall", "before_headers")
    ),
)


class Case(msgspec.Struct, frozen=True):
    """One task: a trouble, how often it strikes, and how the agent wants its answers."""

    number: int
    trouble: Trouble
    pattern: Pattern
    dialect: str
    delivery: Delivery
    stream: bool
    seed: int

    def __str__(self) -> str:
        trouble = f"{self.trouble.name} {self.trouble.place}".rstrip()
        asked = "streamed" if self.stream else "not streamed"
        return f"{trouble}, {self.pattern}; {self.dialect}, {asked}, delivered {self.delivery}"

    def draw(self, *what: object) -> random.Random:
        """The same draws for the same thing, whenever it is asked."""
        return random.Random(" ".join(map(str, (self.seed, self.number, *what))))

    @property
    def struck(self) -> tuple[int, ...]:
        """The turns in which the fault strikes."""
        turns = self.trouble.turns()
        if self.pattern == "always":
            return turns
        if self.trouble.refuses:
            return (1,)  # the port closes behind the first answer
        return (self.draw("struck").choice(turns),) if turns else ()


def cases(dialects: Sequence[str], seed: int, *, quick: bool) -> list[Case]:
    """Every trouble in every way an answer can be delivered: once and always, each in a dialect that is drawn.

    ``quick``: just one of the two. The first ones are healthy.
    """
    draw = random.Random(f"{seed} cases")
    numbers = itertools.count()
    found = []
    for trouble in (HEALTHY, *TROUBLES):
        patterns: list[Pattern] = ["once", "always"] if trouble.fault else ["never"] * HEALTHY_EACH
        for delivery, stream in WAYS:
            drawn = draw.sample(patterns, 1) if quick and trouble.fault else patterns
            spoken = itertools.cycle(draw.sample(dialects, len(dialects)))
            for pattern, dialect in zip(drawn, spoken, strict=False):
                found.append(Case(next(numbers), trouble, pattern, dialect, delivery, stream, seed))
    return found


# --- what the agent asks --------------------------------------------------------------------------------------------


class Conversation:
    """The agent's side of a task."""

    def __init__(self, case: Case, model: str) -> None:
        self._case = case
        self._model = model
        self._messages = [self._question(0)]

    def request(self) -> Request:
        """What it asks now."""
        return Request(
            self._model,
            self._case.stream,
            tuple(self._messages),
            tools=(Tool(TOOL_NAME, "Run a command.", msgspec.Raw(SCHEMA)),),
            max_output_tokens=MAX_OUTPUT_TOKENS,
        )

    def answered(self, found: Read, turn: int) -> None:
        """It has this answer to that turn, acts on it, and goes on."""
        calls = [ToolCall(id_, call.name, call.arguments) for id_, call in zip(found.ids, found.calls, strict=True)]
        texts = [Text(found.text)] if found.text else []
        self._messages.append(Message("assistant", (*texts, *calls)))
        results = tuple(ToolResult(call.id, (Text(f"It is done. {_mark(turn + 1)}"),)) for call in calls)
        self._messages.append(Message("user", results) if results else self._question(turn + 1))

    def _question(self, turn: int) -> Message:
        return Message("user", (Text(f"This is task {self._case.number}. What is next? {_mark(turn)}"),))


def _mark(turn: int) -> str:
    return f"(turn {turn})"


_MARKS = re.compile(rb"\(turn (\d+)\)")

# --- what the model says --------------------------------------------------------------------------------------------

WORDS = (
    *(
        "above",
        "basket",
        "caf\u00e9",
        "distance",
        "\u201cearly\u201d",
        "forest",
        "gravel",
        "harbour",
        "[ink]",
        "juniper",
        "kettle",
    ),
    *(
        "lantern",
        "meadow",
        "na\u00efve",
        "orchard",
        "pebble",
        "quarry",
        "river;",
        "saddle",
        "timber",
        "\u96e8\u306e\u65e5",
        "velvet",
    ),
    *(
        "window",
        "xylem",
        "yellow",
        "zenith",
        "{brace}",
        "<angle>",
        "\n\nparagraph",
        "back\\slash",
        "\U0001f642",
        "12345",
        "a|pipe",
    ),
    *(
        "mountain",
        "copper",
        "thistle",
        "engine",
        "feather",
        "granite",
        "island",
        "marble",
        "nettle",
        "oyster",
        "pillow",
    ),
)
WORDS_OF_A_TEXT = 14


def answer_of(case: Case, turn: int, who: Who) -> Answer:
    """What this one of the two models says in a turn of its own accord."""
    words = case.draw(turn, who).sample(WORDS, WORDS_OF_A_TEXT)
    text = f"{'Let me see' if who == 'a' else 'Here we go'}: {' '.join(words)}."
    style = case.draw(turn, who, "style")
    return Answer(
        text="" if turn == 2 else text,
        final_text=text,
        reasoning=f"I think of {words[-1]} and {words[0]}.",
        calls=_calls_of(case, turn),
        piece=style.choice((5, 16, 40)),
        pace_s=style.choice((0.0, 0.001)),
    )


def _calls_of(case: Case, turn: int) -> tuple[Call, ...]:
    """Both models call the same."""
    if turn not in CALL_TURNS:
        return ()
    first, second = case.draw(turn, "calls").sample(WORDS, 2)
    lines = ({"command": f"echo {first}"}, {"command": f"touch {second}", "line": case.number})
    return tuple(Call(TOOL_NAME, msgspec.json.encode(line).decode()) for line in lines)


def sayings(case: Case, turn: int) -> list[Saying]:
    """Both wordings: an answer must be one of them."""
    answers = (answer_of(case, turn, "a"), answer_of(case, turn, "b"))
    calls = tuple(Called(call.name, call.arguments) for call in _calls_of(case, turn))
    return [Saying(str(answer.text), calls, "tool_calls" if calls else "stop") for answer in answers]


class Model:
    """One of the two upstreams of a case.

    ``requests`` it has had; ``strikes``: those on which the fault struck; ``unanswered``: those that got not one byte.
    """

    def __init__(self, case: Case, who: Who) -> None:
        self.case = case
        self.who = who
        self.requests = 0
        self.strikes = 0
        self.unanswered = 0

    def __call__(self, received: Received) -> Turn:
        self.requests += 1
        turn = int(_MARKS.findall(received.raw)[-1])
        fault = self._fault(turn)
        self.strikes += fault is not None
        self.unanswered += fault is not None and fault.place == "before_headers" and fault.kind in ("reset", "eof")
        return Turn(self._said(received, turn), fault)

    def _fault(self, turn: int) -> Fault | None:
        case = self.case
        spent = case.pattern == "once" and self.strikes > 0
        if self.who == "b" or spent or turn not in case.struck or case.trouble.refuses:
            return None
        return case.trouble.fault

    def _said(self, received: Received, turn: int) -> Answer:
        own, other = (answer_of(self.case, turn, who) for who in (self.who, "b" if self.who == "a" else "a"))
        shown = shown_text(received)
        said = gone_on_with(own, received, (other,))
        if shown is None or said.text in (None, COMPLETE):
            return said
        return msgspec.structs.replace(said, text=_habit(str(said.text), shown, self.case.draw(turn, "habit")))


def _habit(rest: str, shown: str, draw: random.Random) -> str:
    """Not every model goes on at the very character: some repeat a little, or all, or say that they are done."""
    habit = draw.random()
    if habit < 0.15:
        return shown[-draw.randrange(20, 60) :] + rest
    if habit < 0.25:
        return shown + rest
    return rest + COMPLETE if habit < 0.3 else rest
