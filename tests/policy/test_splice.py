"""Joining a new answer to the text that is already with the client: no byte twice, none left out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

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
    Usage,
    UsageReport,
)
from routerd.policy.splice import (
    LOOKBACK,
    OVERLAP_MIN,
    Diverged,
    Manner,
    Splice,
    overlap,
    seems_whole,
)

SENT = "The report is written to disk. It has three parts"
REST = ", and the second of them needs a look."
STOP = (Finish("stop"), End())
CALL: tuple[Event, ...] = (ToolStart(0, "call_1", "weather"), ToolDelta(0, "{}"), Finish("tool_calls"), End())

PARTS = ["abcdefghijklmnop", "cdefghijklmnopqr", "ab", "c", " ", "\n", ".", COMPLETE, COMPLETE[:4]]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=10).map("".join)
WORDS = st.text(alphabet=st.characters(codec="utf-8", exclude_characters=COMPLETE[0]), max_size=80)
SENTS = st.builds(
    "{}{}{}".format,
    WORDS,
    st.sampled_from(["wxyz1234 and 5678", "to the very end of it", "abcdefgh ijklmnop."]),
    st.text(" \n", max_size=3),
)
RESTS = WORDS.map(str.lstrip)
CUTS = st.lists(st.integers(0, 300), max_size=12)


def texts(*pieces: str) -> list[Event]:
    return [TextDelta(0, piece) for piece in pieces if piece]


def said(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def joined(manner: Manner, sent: str, *pieces: str, end: Sequence[Event] = STOP) -> str:
    """All that the client has in the end."""
    splice = Splice(manner, sent)
    return sent + said([one for event in (*texts(*pieces), *end) for one in splice.feed([event])])


def cut(text: str, cuts: Sequence[int]) -> list[str]:
    """The text in pieces."""
    places = sorted({place % (len(text) + 1) for place in cuts} | {0, len(text)})
    return [text[start:stop] for start, stop in pairwise(places)]


class TestPrefill:
    def test_the_rest_is_the_rest(self) -> None:
        """A model that goes on writing its turn needs no trimming."""
        assert joined("prefill", SENT, REST) == SENT + REST

    def test_a_server_that_gives_the_turn_back_says_nothing_twice(self) -> None:
        """However it cuts its text."""
        assert joined("prefill", SENT, SENT[:10], SENT[10:] + REST[:3], REST[3:]) == SENT + REST

    def test_words_the_model_repeats_are_its_own(self) -> None:
        """It was not asked to repeat anything but the turn as a whole, so a refrain stays."""
        assert joined("prefill", "Row, row, row your boat, row, ", "row, row your boat.") == (
            "Row, row, row your boat, row, row, row your boat."
        )

    def test_the_blank_at_the_seam_counts_once(self) -> None:
        """The turn was handed over without it, so the model writes it again."""
        assert joined("prefill", "One. ", " Two.") == "One. Two."
        assert joined("prefill", "One.\n", "\n\nTwo.") == "One.\n\nTwo."
        assert joined("prefill", "One. ", "Two.") == "One. Two."

    def test_however_little_was_sent_to_begin_with_it_is_to_begin_anew(self) -> None:
        """That is likelier than a stammer."""
        assert joined("prefill", "I", "It is.") == "It is."
        assert joined("instructed", "Now f", "Now for it.") == "Now for it."

    def test_nothing_more_is_nothing_more(self) -> None:
        """The text was whole: only the end is added."""
        splice = Splice("prefill", SENT)

        assert splice.feed(STOP) == list(STOP)

    def test_text_passes_at_once_when_it_cannot_be_an_echo(self) -> None:
        """Nothing is held that need not be."""
        assert Splice("prefill", SENT).feed(texts(", and")) == texts(", and")


class TestInstructed:
    @pytest.mark.parametrize(
        "repeated",
        [SENT, SENT[4:], SENT[-30:], SENT[-16:], ""],
        ids=["all", "nearly all", "a sentence", "a few words", "none"],
    )
    def test_what_is_repeated_is_cut_off(self, repeated: str) -> None:
        """All of it, the end of it, or none: the client cannot tell."""
        assert joined("instructed", SENT, repeated + REST) == SENT + REST

    def test_a_repetition_longer_than_any_hold_is_cut_off_as_well(self) -> None:
        """A text of pages, given back word by word."""
        sent = " ".join(f"word{number}" for number in range(3000))

        assert joined("instructed", sent, *cut(sent + REST, range(0, 40_000, 13))) == sent + REST
        late = sent[-LOOKBACK:]
        assert joined("instructed", sent, *cut(late + REST, range(0, 9_000, 13))) == sent + REST

    def test_too_short_a_repetition_is_chance(self) -> None:
        """A word may well come twice."""
        assert joined("instructed", "They had numbers", " numbers of them.") == "They had numbers numbers of them."

    def test_rulers_and_brackets_repeat_by_nature(self) -> None:
        """They are not taken for a repetition: to cut them would lose some."""
        assert joined("instructed", "Title\n----------", "-----------\nText") == "Title\n---------------------\nText"

    def test_a_model_that_finds_nothing_missing_says_so_unheard(self) -> None:
        """The word it was given for that never reaches the client, nor does it behind a text."""
        for pieces in ([COMPLETE], [COMPLETE[:3], COMPLETE[3:] + "\n"]):
            assert joined("instructed", SENT, *pieces) == SENT
        assert joined("instructed", SENT, REST + COMPLETE[:5], COMPLETE[5:]) == SENT + REST

    def test_half_of_that_word_is_just_text(self) -> None:
        """A bracket opens many things."""
        assert joined("instructed", SENT, " [COMP", "UTED]") == f"{SENT} [COMPUTED]"
        assert joined("instructed", SENT, " [") == f"{SENT} ["

    def test_calls_follow_the_text(self) -> None:
        """What was held leaves in front of the first call."""
        splice = Splice("instructed", SENT)

        assert splice.feed([*texts("It has three parts"), *CALL]) == list(CALL)

    def test_thinking_before_the_rest_stays_unsaid(self) -> None:
        """The client is in the middle of a text; thinking about how to go on has no place there."""
        splice = Splice("instructed", SENT)
        events: list[Event] = [Start("id", "model"), ReasoningDelta(0, "They want more."), *texts(REST)]

        assert splice.feed(events) == texts(REST)

    def test_usage_passes(self) -> None:
        """Whenever it comes."""
        usage = UsageReport(Usage(1))

        assert Splice("instructed", SENT).feed([usage]) == [usage]


class TestRerun:
    def test_only_the_calls_of_another_wording_are_sent(self) -> None:
        """The text already sent stands for their preamble."""
        assert Splice("rerun", SENT).feed([*texts("Another wording."), *CALL]) == list(CALL)

    def test_what_follows_the_same_wording_is_sent(self) -> None:
        """Text, then calls."""
        assert Splice("rerun", SENT).feed([*texts(SENT, REST), *CALL]) == [*texts(REST), *CALL]

    def test_the_same_text_goes_on(self) -> None:
        """Without calls as well."""
        assert joined("rerun", SENT, SENT, REST) == SENT + REST

    def test_another_text_cannot_be_joined(self) -> None:
        """And nothing of it is given out before that is known."""
        splice = Splice("rerun", SENT)

        assert splice.feed(texts("Another", " text.")) == []
        with pytest.raises(Diverged):
            splice.feed(STOP)


class TestDocument:
    @pytest.mark.parametrize("manner", ["prefill", "instructed", "rerun"])
    def test_two_parts_that_make_one_document_are_joined(self, manner: Manner) -> None:
        """The whole is JSON."""
        sent, rest = '{"city": "Os', 'lo"}'
        whole = sent + rest if manner == "rerun" else rest

        assert said(Splice(manner, sent, document=True).feed([*texts(whole), *STOP])) == rest

    @pytest.mark.parametrize("rest", ['{"town": "Oslo"}', "lo", ""])
    def test_two_parts_that_make_none_are_refused(self, rest: str) -> None:
        """A second beginning, or no end."""
        with pytest.raises(Diverged):
            Splice("instructed", '{"city": "Os', document=True).feed([*texts(rest), *STOP])

    def test_a_document_that_the_length_limit_cut_is_what_the_client_asked_for(self) -> None:
        """Its finish says so."""
        events = [*texts('lo"'), Finish("length"), End()]

        assert Splice("instructed", '{"city": "Os', document=True).feed(events) == events


class TestLaws:
    @given(sent=SENTS, rest=RESTS, echo=st.booleans(), cuts=CUTS)
    def test_prefill_loses_nothing_and_repeats_nothing(self, sent: str, rest: str, echo: bool, cuts: list[int]) -> None:
        """Whether the server gives the turn back or not, and however it cuts its text."""
        shown = sent.rstrip()
        assume(not rest.startswith(shown))  # a refrain of all there is
        text = sent[len(shown) :] + rest

        assert joined("prefill", sent, *cut(shown + text if echo else text, cuts)) == sent + rest

    @given(sent=SENTS, rest=RESTS, repeated=st.just(0) | st.integers(OVERLAP_MIN, 120), cuts=CUTS)
    def test_instructed_loses_nothing_and_repeats_nothing(
        self, sent: str, rest: str, repeated: int, cuts: list[int]
    ) -> None:
        """Whatever ending of the text the model repeats, if it is long enough to be known as such."""
        shown = sent.rstrip()
        ending = shown[-repeated:] if repeated else ""
        text = sent[len(shown) :] + rest
        assume(overlap(shown, ending + text) == len(ending))  # the rest repeats nothing by chance

        assert joined("instructed", sent, *cut(ending + text, cuts)) == sent + rest

    @given(
        manner=st.sampled_from(["prefill", "instructed", "rerun"]),
        sent=TEXTS,
        text=TEXTS,
        cuts=CUTS,
        end=st.sampled_from([STOP, CALL]),
    )
    def test_how_the_text_is_cut_makes_no_difference(
        self, manner: Manner, sent: str, text: str, cuts: list[int], end: Sequence[Event]
    ) -> None:
        """Nor whether events come one by one."""

        def outcome(pieces: list[str]) -> str | None:
            try:
                return joined(manner, sent, *pieces, end=end)
            except Diverged:
                return None

        assert outcome([text]) == outcome(cut(text, cuts)) == outcome(list(text))

    @given(sent=TEXTS, text=TEXTS)
    def test_an_overlap_is_an_ending_and_a_beginning(self, sent: str, text: str) -> None:
        """And what is left of the text begins right behind it."""
        length = overlap(sent, text)

        assert sent.endswith(text[:length])


class TestSettle:
    @pytest.mark.parametrize("manner", ["prefill", "instructed"])
    @pytest.mark.parametrize(("sent", "text", "rest"), [("It needs a. And the", ".", "."), ("One.\n", "\n", "")])
    def test_a_call_ends_what_is_held_of_the_text(self, manner: Manner, sent: str, text: str, rest: str) -> None:
        """The call itself may be held elsewhere, and be lost there: the text in front of it is not lost with it."""
        splice = Splice(manner, sent)
        first = said(splice.feed(texts(text)))

        assert first + said(splice.settle()) == rest
        assert [*splice.settle(), *splice.feed(CALL)] == list(CALL)

    @pytest.mark.parametrize("manner", ["prefill", "instructed", "rerun"])
    def test_with_nothing_held_nothing_changes(self, manner: Manner) -> None:
        """Text that is held in front of the call, and comes with it, is still joined."""
        splice = Splice(manner, SENT)

        assert splice.settle() == []
        assert said(splice.feed([*texts(SENT + REST), *CALL])) == REST


@pytest.mark.parametrize(
    ("text", "whole"), [("Done.", True), ("Done.\n", True), ("`ls`", True), ("and", False), ("", False)]
)
def test_a_text_seems_whole_if_it_ends_like_one(text: str, whole: bool) -> None:
    """With a mark that closes something."""
    assert seems_whole(text) is whole
