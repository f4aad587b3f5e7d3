"""What came with tool calls is found again, within bounds, and never in another conversation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routerd.canonical import (
    Event,
    Finish,
    Frame,
    Reasoning,
    ReasoningDelta,
    Remembered,
    TextDelta,
    ToolDelta,
    ToolStart,
)
from routerd.policy.memory import ENTRY_BYTES_MAX, KEEP_S, Memory, Rows
from routerd.policy.transcript import THINKING_CHARACTERS_MAX, Gate

HERE, ELSEWHERE = 0xA11CE, 0xB0B  # conversations
WALL = 1_763_000_000.0
RANDOM = "call_8c1f0e55aa0912cd"  # nobody else has this id
COUNTED = "call_0"  # many have this one


def thought(text: str = "Look first.", **fields: object) -> Remembered:
    return Remembered("lab/m", (Reasoning(text),), **fields)  # type: ignore[arg-type]  # what tests give is right


def remember(
    memory: Memory, *call_ids: str, text: str = "Look first.", conversation: int = HERE, wall: float = WALL
) -> Rows:
    return memory.remember(conversation, call_ids, thought(text), wall)


def reasoning(memory: Memory, call_id: str, conversation: int = HERE) -> str | None:
    remembered = memory.recall(conversation, call_id)
    return None if remembered is None else remembered.reasoning


# --- found again ------------------------------------------------------------------------------------------------------


def test_all_calls_of_an_answer_lead_to_it() -> None:
    """Which of several parallel calls a client keeps does not matter."""
    memory = Memory()
    remember(memory, RANDOM, "call_1", "call_2")

    assert [reasoning(memory, call_id) for call_id in (RANDOM, "call_1", "call_2")] == ["Look first."] * 3
    assert reasoning(memory, "call_3") is None


@pytest.mark.parametrize(
    ("call_id", "expected"),
    [
        (RANDOM, "Look first."),
        ("chatcmpl-tool-1f0e55aa0912cd8c1f0e55aa0912cd8c", "Look first."),
        ("toolu_01A09q90qw90lq917835lq9", "Look first."),
        ("function-call-7218739812370912", "Look first."),
        (COUNTED, None),
        ("functions.terminal:3", None),
        ("0", None),
        ("readTheManualThoroughly", None),
        ("2968-LWy3uasib", None),
    ],
)
def test_other_conversations(call_id: str, expected: str | None) -> None:
    """An id that could be anybody's is good only in its conversation; history may be cut, so a random one is always."""
    memory = Memory()
    remember(memory, call_id)

    assert reasoning(memory, call_id) == "Look first."
    assert expected == reasoning(memory, call_id, ELSEWHERE)


def test_counted_ids_of_two_conversations() -> None:
    """Each has its own."""
    memory = Memory()
    remember(memory, COUNTED, text="Mine.")
    remember(memory, COUNTED, text="Yours.", conversation=ELSEWHERE)

    assert (reasoning(memory, COUNTED), reasoning(memory, COUNTED, ELSEWHERE)) == ("Mine.", "Yours.")


def test_the_later_of_equal_ids_stands() -> None:
    """The newest turn is the one that vendors check."""
    memory = Memory()
    remember(memory, COUNTED, "call_1", text="Earlier.")
    remember(memory, "call_1", text="Later.")

    assert (reasoning(memory, COUNTED), reasoning(memory, "call_1")) == ("Earlier.", "Later.")


@pytest.mark.parametrize(
    ("call_ids", "remembered"), [((RANDOM,), Remembered("lab/m")), ((), thought()), (("",), thought())]
)
def test_nothing_to_remember(call_ids: tuple[str, ...], remembered: Remembered) -> None:
    """An answer without thinking or seals, or whose calls have no ids, leaves nothing."""
    memory = Memory()

    assert memory.remember(HERE, call_ids, remembered, WALL) == []
    assert repr(memory) == "<Memory 0 answers, 0 bytes>"


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_least_recently_recalled_leaves_first() -> None:
    """A conversation that goes on keeps its answers; the row of one that left is to be forgotten."""
    memory = Memory(entries_max=2)
    first, _ = remember(memory, "a"), remember(memory, "b")
    kept = reasoning(memory, "a")
    rows = remember(memory, "c")

    assert kept == reasoning(memory, "a") == "Look first."
    assert reasoning(memory, "b") is None
    assert [row for row in rows if not row[1]] == [(first[0][0].replace(" a", " b"), b"")]


def test_too_large_an_answer_keeps_its_seals() -> None:
    """Thinking can be replaced by a blank, a seal by nothing."""
    memory = Memory()
    large = thought("x" * ENTRY_BYTES_MAX, signatures={RANDOM: '{"s":1}'})
    memory.remember(HERE, [RANDOM], large, WALL)

    assert memory.recall(HERE, RANDOM) == Remembered("lab/m", signatures={RANDOM: '{"s":1}'})
    assert memory.remember(HERE, ["b"], thought("x" * ENTRY_BYTES_MAX), WALL) == []


_answers = st.tuples(st.lists(st.sampled_from("abcdef"), max_size=3), st.integers(0, 400), st.sampled_from("abcdef"))


@given(answers=st.lists(_answers, max_size=40))
def test_disk_holds_what_memory_holds(answers: list[tuple[list[str], int, str]]) -> None:
    """Whatever happens, the bounds hold, and a restart finds exactly what was known."""
    memory, disk = Memory(entries_max=4, bytes_max=1000), dict[str, bytes]()
    for call_ids, length, recalled in answers:
        for key, value in remember(memory, *call_ids, text="x" * length):
            disk[key] = value
        memory.recall(HERE, recalled)
    disk = {key: value for key, value in disk.items() if value}
    after = Memory(entries_max=4, bytes_max=1000)

    assert repr(memory) == f"<Memory {len(disk)} answers, {sum(map(len, disk.values()))} bytes>"
    assert len(disk) <= 4
    assert sum(map(len, disk.values())) <= 1000
    assert after.restore(disk, WALL) == []
    assert repr(memory) == repr(after)


# --- restarts ---------------------------------------------------------------------------------------------------------


def saved(*call_ids: str, wall: float = WALL) -> dict[str, bytes]:
    return dict(remember(Memory(), *call_ids, wall=wall))


def test_restart() -> None:
    """All of it is there again, by every id."""
    memory = Memory()
    rows = memory.remember(HERE, [RANDOM, COUNTED], thought(details="[1]", signatures={COUNTED: "{}"}), WALL)
    after = Memory()
    after.restore(dict(rows), WALL + 60)

    for call_id in (RANDOM, COUNTED):
        assert after.recall(HERE, call_id) == memory.recall(HERE, call_id) is not None


@pytest.mark.parametrize(
    "value", [b"", b"{", b"[]", b'{"wall":1e12,"keys":["other"],"remembered":{"author":"x"}}', b"\xff"]
)
def test_restart_with_unreadable_rows(value: bytes) -> None:
    """They are forgotten, and cost nothing else."""
    memory = Memory()

    assert memory.restore({"a": value} | saved(RANDOM), WALL) == [("a", b"")]
    assert reasoning(memory, RANDOM) == "Look first."


def test_old_answers_are_forgotten() -> None:
    """After some days they are gone, from the memory and from the disk, at a restart or without one."""
    memory = Memory()
    rows = saved("old") | saved(RANDOM, wall=WALL + KEEP_S)
    gone = [(key, b"") for key in saved("old")]

    assert gone == Memory().restore(rows, WALL + KEEP_S)
    assert memory.restore(rows, WALL + KEEP_S - 1) == []
    assert memory.expire(WALL + KEEP_S - 1) == []
    assert gone == memory.expire(WALL + KEEP_S)
    assert (reasoning(memory, "old"), reasoning(memory, RANDOM)) == (None, "Look first.")


def test_restart_with_smaller_bounds() -> None:
    """The newest answers stay."""
    rows = {key: value for at in range(5) for key, value in saved(f"call_{at}", wall=WALL + at).items()}
    memory = Memory(entries_max=2)

    assert len(memory.restore(rows, WALL)) == 3
    assert [reasoning(memory, f"call_{at}") is not None for at in range(5)] == [False] * 3 + [True] * 2


# --- collected --------------------------------------------------------------------------------------------------------


def answer(*events: Event) -> Remembered:
    gate = Gate(whole=False)
    gate.admit([Frame(b"", (event,)) for event in events])
    return gate.remembered("lab/m")


CALL = (ToolStart(0, "a", "f", '{"s":1}'), ToolDelta(0, "{}"), ToolStart(1, "b", "f"), ToolDelta(1, "{}"))


def test_what_came_with_calls() -> None:
    """Thinking by blocks with their seals, the vendor's own form of it, and the seals on the calls."""
    remembered = answer(
        ReasoningDelta(0, "Look "),
        ReasoningDelta(0, "first."),
        ReasoningDelta(0, "", "seal"),
        TextDelta(0, "I look."),
        ReasoningDelta(1, "Then leap."),
        ReasoningDelta(2, "", sealed="secret"),
        *CALL,
        Finish("tool_calls", "[1]"),
    )

    thinking = Reasoning("Look first.", "seal"), Reasoning("Then leap."), Reasoning("", sealed="secret")

    assert remembered == Remembered("lab/m", thinking, "[1]", {"a": '{"s":1}'})
    assert remembered.reasoning == "Look first.\n\nThen leap."


def test_thinking_of_a_very_long_answer() -> None:
    """Half of it would be worse than none."""
    remembered = answer(*(ReasoningDelta(0, "x" * (THINKING_CHARACTERS_MAX // 2)),) * 3, *CALL, Finish("tool_calls"))

    assert remembered == Remembered("lab/m", signatures={"a": '{"s":1}'})
