"""Answers are gone on from by name, within bounds, and no conversation is cut in the middle or runs into another."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from routerd.policy.answers import (
    CHAIN_MAX,
    CONTESTED_S,
    ENTRY_BYTES_MAX,
    FRESH_SHARE,
    INDEX,
    ITEMS,
    KEEP_S,
    RENEW_S,
    TOUCH_S,
    Answers,
    Rows,
    name_of,
    owner_of,
)
from routerd.state.sqlite import KEEP_S as STORE_KEEP_S

WALL = 1_763_000_000.0
SAID = b"[[],[]]"
DAY_S = 86_400.0


def conversation(answers: Answers, *names: str, wall: float = WALL, items: bytes = SAID) -> Rows:
    """Answers, each gone on from the one before."""
    rows: Rows = []
    parent = ""
    for place, name in enumerate(names):
        rows += answers.remember(name, parent, items, wall + place)
        parent = name
    return rows


def chain(answers: Answers, name: str, wall: float = WALL) -> list[str]:
    return answers.use(name, wall)[0]


def on_disk(rows: Iterable[tuple[str, str, bytes]]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The rows that are left of the index and of the items, when all of these are written in order."""
    kinds: dict[str, dict[str, bytes]] = {INDEX: {}, ITEMS: {}}
    for kind, name, value in rows:
        kinds[kind][name] = value
    index, items = ({name: value for name, value in rows.items() if value} for rows in kinds.values())
    return index, items


# --- found again ------------------------------------------------------------------------------------------------------


def test_an_answer_leads_back_to_the_first() -> None:
    """Oldest first, from wherever a client goes on."""
    answers = Answers()
    conversation(answers, "a", "b", "c")
    answers.remember("other b", "a", SAID, WALL + 9)

    assert chain(answers, "c") == ["a", "b", "c"]
    assert chain(answers, "b") == ["a", "b"]
    assert chain(answers, "other b") == ["a", "other b"]
    assert chain(answers, "unknown") == []


def test_names_are_the_owners_own() -> None:
    """The same id under another token is another answer, and neither can be read from the name."""
    mine, yours, anybodys = (name_of("resp_1", owner_of(token)) for token in ("mine", "yours", ""))

    assert len({mine, yours, anybodys}) == 3
    assert "resp_1" not in mine + anybodys


def test_a_server_that_uses_an_id_twice() -> None:
    """The new answer begins anew; what was said behind the old one is not joined to it."""
    answers = Answers()
    conversation(answers, "a", "b", "c")

    assert not answers.joins("a", "c", WALL + 9)
    answers.remember("a", "", SAID, WALL + 9)
    assert chain(answers, "a") == ["a"]
    assert chain(answers, "c") == []
    assert not answers.joins("d", "c", WALL + 10)


def test_two_conversations_with_one_name() -> None:
    """Nobody can know which is meant, so it leads to neither; what was said behind it is not lost."""
    answers = Answers()
    rows = conversation(answers, "a", "b", "c")
    contested = answers.contest("b", "", WALL + 9)
    restored = Answers()
    restored.restore(on_disk([*rows, *(contested or ())])[0], WALL)

    for one in (answers, restored):
        assert chain(one, "b") == []
        assert chain(one, "c") == ["a", "b", "c"]


def test_no_contest() -> None:
    """With nobody, within the same conversation, and with one that has not been heard of for a day."""
    answers = Answers()
    conversation(answers, "a")

    assert answers.contest("b", "", WALL) is None
    assert answers.contest("a", "a", WALL) is None
    assert answers.contest("a", "", WALL + CONTESTED_S) is None
    assert chain(answers, "a") == ["a"]


def test_a_link_that_will_not_hold_is_not_made() -> None:
    """To a parent that is gone, to one with too many before it, and to a conversation that began long ago."""
    answers = Answers()
    conversation(answers, *map(str, range(CHAIN_MAX)))
    last = str(CHAIN_MAX - 1)

    assert not answers.joins("new", "unknown", WALL)
    assert not answers.joins("new", last, WALL)
    assert len(chain(answers, last)) == CHAIN_MAX
    assert answers.joins("new", "5", WALL + RENEW_S - 1)
    assert not answers.joins("new", "5", WALL + RENEW_S)


def test_the_disk_keeps_answers_for_longer_than_they_can_be_needed() -> None:
    """A store removes rows that nobody renews; a first answer is not renewed for as long as it is gone on from."""
    assert STORE_KEEP_S > KEEP_S + RENEW_S


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_the_conversation_used_longest_ago_leaves_first() -> None:
    """From its end; one that goes on keeps all of its answers, however old."""
    answers = Answers(entries_max=5)
    conversation(answers, "a", "b")
    conversation(answers, "x", "y", wall=WALL + 100)
    chain(answers, "b", WALL + 200)
    index, items = on_disk(
        [*answers.remember("c", "b", SAID, WALL + 201), *answers.remember("d", "c", SAID, WALL + 202)]
    )

    assert chain(answers, "d") == ["a", "b", "c", "d"]
    assert chain(answers, "x") == ["x"]
    assert chain(answers, "y") == []
    assert "y" not in index
    assert set(items) == {"c", "d"}


def test_whole_conversations_do_not_push_out_those_that_go_on() -> None:
    """Clients that name no answer fill their share of the room, and no more where somebody else needs it."""
    answers = Answers(bytes_max=100 * len(SAID))
    conversation(answers, *(f"mine {place}" for place in range(50)))
    for place in range(1000):
        answers.remember(f"whole {place}", "", SAID, WALL + 1000 + place)

    assert len(chain(answers, "mine 49")) == 50
    assert chain(answers, "whole 999") == ["whole 999"]
    assert chain(answers, f"whole {999 - 49}") != []
    assert chain(answers, "whole 900") == []


def test_their_share_is_theirs() -> None:
    """Where everything else is full of conversations, there is room all the same for one to begin."""
    answers = Answers(entries_max=100)
    conversation(answers, *(f"mine {place}" for place in range(100)))
    for place in range(50):
        answers.remember(f"new {place}", "", SAID, WALL + 1000 + place)

    begun = [place for place in range(50) if chain(answers, f"new {place}")]
    assert begun == list(range(50 - int(FRESH_SHARE * 100), 50))


def test_too_large_an_answer_is_not_kept() -> None:
    """It would push out everybody else's. Nor is the one whose place it takes."""
    answers = Answers()

    answers.remember("b", "", SAID, WALL)

    assert not answers.remember("a", "", bytes(ENTRY_BYTES_MAX + 1), WALL)
    assert on_disk(answers.remember("b", "", bytes(ENTRY_BYTES_MAX + 1), WALL)) == ({}, {})
    assert chain(answers, "a") == chain(answers, "b") == []


def test_age() -> None:
    """What nobody has used for long leaves, on disk as well; a use of the last answer is a use of the first."""
    answers = Answers()
    saved = conversation(answers, "a", "b")
    saved += answers.remember("x", "", SAID, WALL)
    saved += answers.use("b", WALL + KEEP_S - 10)[1]
    gone = answers.expire(WALL + KEEP_S + 10)
    index, items = on_disk([*saved, *gone])

    assert chain(answers, "b") == ["a", "b"]
    assert set(index) == set(items) == {"a", "b"}


def test_uses_are_saved_once_a_day() -> None:
    """Each rewrites rows of the index alone, and only those that the disk has too old a time of."""
    answers = Answers()
    conversation(answers, "a", "b")

    assert answers.use("b", WALL + TOUCH_S / 2)[1] == []
    assert {(kind, name) for kind, name, _ in answers.use("b", WALL + TOUCH_S + 9)[1]} == {(INDEX, "a"), (INDEX, "b")}
    assert answers.use("b", WALL + TOUCH_S + 10)[1] == []


# --- across restarts --------------------------------------------------------------------------------------------------


def test_restored() -> None:
    """From the small rows alone, in the order of use; what is too old or cannot be read is forgotten on disk."""
    answers = Answers()
    rows = conversation(answers, "old", wall=WALL - KEEP_S)
    rows += conversation(answers, "x", "y", wall=WALL - 2 * DAY_S)
    rows += conversation(answers, "a", "b", wall=WALL - 3 * DAY_S)
    rows += answers.use("b", WALL - DAY_S)[1]
    index, _ = on_disk(rows)
    restored = Answers(entries_max=3)
    gone = restored.restore(index | {"torn": b"{"}, WALL)

    assert chain(restored, "b") == ["a", "b"]
    assert chain(restored, "x") == ["x"]
    assert {name for _, name, _ in gone} == {"old", "torn", "y"}


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.booleans()), max_size=60),
    st.integers(1, 8),
)
def test_what_is_known_is_whole(steps: list[tuple[int, int, bool]], room: int) -> None:
    """Whatever is made, used and lost: index, items and disk agree, and whoever has a parent's link has the parent."""
    answers = Answers(entries_max=room, bytes_max=room * len(SAID))
    rows: Rows = []
    for wall, (name, parent, use) in enumerate(steps):
        if use:
            rows += answers.use(str(name), WALL + wall)[1]
        else:
            joined = answers.joins(str(name), str(parent), WALL + wall)
            rows += answers.remember(str(name), str(parent) if joined else "", SAID, WALL + wall)
    index, items = on_disk(rows)
    restored = Answers()
    restored.restore(index, WALL + len(steps))

    assert set(index) == set(items)
    assert len(index) <= room
    assert [chain(answers, str(name)) for name in range(13)] == [chain(restored, str(name)) for name in range(13)]
