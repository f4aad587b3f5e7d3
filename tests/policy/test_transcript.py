"""What may go downstream and when: text at once, calls only whole, nothing before it is worth anything."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routerd.canonical import (
    End,
    Event,
    Fault,
    Finish,
    Frame,
    ReasoningDelta,
    Start,
    TextDelta,
    ToolDelta,
    ToolStart,
    Usage,
    UsageReport,
)
from routerd.policy.calls import Schemas
from routerd.policy.transcript import (
    CUT_CALL,
    EMPTY_ANSWER,
    HELD_BYTES_MAX,
    SCHEMA_CODES,
    TEXT_CHARACTERS_MAX,
    BadAnswer,
    Gate,
    InBandFault,
    Transcript,
)

START = Start("id", "model")
TEXT = TextDelta(0, "I look. ")
THOUGHT = ReasoningDelta(0, "Hm.")
CALL = ToolStart(0, "call_1", "weather")
ARGUMENTS = (ToolDelta(0, '{"city": '), ToolDelta(0, '"Oslo"}'))
SECOND = (ToolStart(1, "call_2", "weather"), ToolDelta(1, '{"city": "Rome"}'))
STOP, CALLED = Finish("stop"), Finish("tool_calls")
USAGE = UsageReport(Usage(10, 0, 5))
SCHEMAS = {"weather": {"properties": {"city": {"type": "string"}}, "required": ["city"]}}


def frames(*events: Event) -> list[Frame]:
    """A frame for each event, told apart by its bytes."""
    return [Frame(b"%d;" % number, (event,)) for number, event in enumerate(events)]


def events_of(passed: Iterable[Frame]) -> list[Event]:
    return [event for frame in passed for event in frame.events]


def gate(*, whole: bool = False, forgiven: Iterable[str] = ()) -> Gate:
    return Gate(whole=whole, schemas=lambda: SCHEMAS, forgiven=frozenset(forgiven))


def refused(*events: Event, forgiven: Iterable[str] = ()) -> str:
    """The code under which these events are refused."""
    with pytest.raises(BadAnswer) as bad:
        gate(forgiven=forgiven).admit(frames(*events))
    return bad.value.code


class TestText:
    def test_nothing_leaves_before_there_is_content(self) -> None:
        """A failure until then is hidden by forgetting what was held."""
        assert gate().admit([*frames(START, USAGE), Frame(b": ping\n\n", ())]) == []

    @pytest.mark.parametrize("content", [TEXT, THOUGHT])
    def test_content_leaves_at_once_with_all_before_it(self, content: Event) -> None:
        """In the order it came."""
        given = frames(START, content)

        assert gate().admit(given) == given

    def test_blank_text_is_not_content(self) -> None:
        """It waits for the first word, but counts as a sign of life."""
        opened = gate()

        assert opened.admit(frames(START, TextDelta(0, "\n\n"))) == []
        assert opened.progress
        assert len(opened.admit(frames(TEXT))) == 3

    def test_comments_pass_and_are_no_sign_of_life(self) -> None:
        """A server that only pings is silent."""
        opened = gate()
        opened.admit(frames(TEXT))
        ping = Frame(b": ping\n\n", ())

        assert opened.admit([ping]) == [ping]
        assert not opened.progress

    def test_whole_delivery_holds_everything_until_the_end(self) -> None:
        """Then all of it may go."""
        held, given = gate(whole=True), frames(START, TEXT, STOP, End())

        assert held.admit(given) == []
        assert held.close() == given

    def test_more_than_any_answer_is_not_held(self) -> None:
        """Memory is bounded."""
        held = gate(whole=True)
        huge = Frame(b"x" * (HELD_BYTES_MAX // 2 + 1), (TEXT,))
        held.admit([huge])

        with pytest.raises(BadAnswer, match="too_long_held"):
            held.admit([huge])


class TestCalls:
    def test_a_call_is_held_until_the_finish(self) -> None:
        """With everything after it; the text in front is out already."""
        opened = gate()
        given = frames(START, TEXT, CALL, *ARGUMENTS, *SECOND, CALLED, USAGE, End())

        assert opened.admit(given[:7]) == given[:2]
        assert opened.admit(given[7:]) == given[2:]

    def test_what_was_passed_before_a_bad_call_is_known(self) -> None:
        """The rest of the text may have come in the same read as the end of the call."""
        opened = gate()
        given = frames(TEXT, CALL, ToolDelta(0, "{"), CALLED)

        with pytest.raises(BadAnswer):
            opened.admit(given)
        assert opened.passed == given[:1]

    @pytest.mark.parametrize(
        ("events", "code"),
        [
            ((CALL, ToolDelta(0, '{"city": "Os'), CALLED), "bad_arguments"),
            ((CALL, ToolDelta(0, '{"city": "Os'), STOP), "bad_arguments"),
            ((CALL, ToolDelta(0, '{"city": "Os'), Finish("length")), CUT_CALL),
            ((CALL, *ARGUMENTS, ToolStart(1, "call_2", "weather"), ToolDelta(1, "{"), CALLED), "bad_arguments"),
            ((CALL, ToolDelta(0, '{"city": 1}'), CALLED), "wrong_type"),
            ((CALL, CALLED), "missing_argument"),
            ((ToolStart(0, "call_1", "dance"), CALLED), "unknown_tool"),
            ((ToolStart(0, "call_1", ""), *ARGUMENTS, CALLED), "nameless_call"),
            ((ToolDelta(0, "{}"), CALLED), "arguments_without_call"),
            ((START, STOP), EMPTY_ANSWER),
            ((START, THOUGHT, TextDelta(0, " \n"), STOP), EMPTY_ANSWER),
            ((START, CALLED), EMPTY_ANSWER),
        ],
    )
    def test_what_nobody_could_act_on_is_refused(self, events: tuple[Event, ...], code: str) -> None:
        """By name, and while it is still held."""
        assert code == refused(*events)

    def test_thinking_up_to_the_length_limit_is_an_answer(self) -> None:
        """The client learns that its limit was too low; elsewhere it would be no higher."""
        assert gate().admit(frames(THOUGHT, Finish("length")))

    def test_a_second_call_that_fits_no_schema_passes(self) -> None:
        """So that is how models understand this tool; the agent will tell them."""
        given = frames(CALL, ToolDelta(0, '{"town": "Oslo"}'), CALLED)

        assert gate(forgiven=SCHEMA_CODES).admit(given) == given

    @pytest.mark.parametrize("finish", [CALLED, STOP])
    def test_arguments_that_are_not_json_never_pass(self, finish: Finish) -> None:
        """Whatever is forgiven."""
        forgiven = {*SCHEMA_CODES, CUT_CALL, EMPTY_ANSWER}

        assert refused(CALL, ToolDelta(0, '{"city"'), finish, forgiven=forgiven) == "bad_arguments"

    def test_a_call_that_is_cut_off_everywhere_is_left_out(self) -> None:
        """The client gets what is whole, and the length limit as the reason."""
        given = frames(TEXT, CALL, *ARGUMENTS, SECOND[0], ToolDelta(1, '{"ci'), Finish("length"))
        passed = gate(forgiven={CUT_CALL}).admit(given)

        assert events_of(passed) == [TEXT, CALL, *ARGUMENTS, Finish("length")]

    def test_nothing_to_add_may_be_the_right_answer(self) -> None:
        """Where a text is gone on with that was whole."""
        given = frames(START, STOP)

        assert gate(forgiven={EMPTY_ANSWER}).admit(given) == given

    def test_repaired_arguments_leave_in_place_of_the_models_own(self) -> None:
        """In frames without bytes, which are encoded anew; all other frames are as they came."""
        opened = gate()
        pieces = (ToolDelta(0, '{"city": '), ToolDelta(0, '"Oslo",}'))
        given = frames(TEXT, CALL, *pieces, *SECOND, CALLED, End())
        passed = opened.admit(given)

        assert events_of(passed) == [TEXT, CALL, ToolDelta(0, '{"city": "Oslo"}'), *SECOND, CALLED, End()]
        assert [frame.raw for frame in passed] == [b"0;", b"", b"4;", b"5;", b"6;", b"7;"]
        assert opened.repairs == 1

    def test_schemas_are_read_only_when_a_call_was_made(self) -> None:
        """Most of a request's bytes are tools; answers in text do not pay for them."""

        def schemas() -> Schemas:
            raise AssertionError("read in vain")

        assert Gate(whole=False, schemas=schemas).admit(frames(TEXT, STOP))


class TestFaults:
    def test_an_error_in_mid_answer_is_raised(self) -> None:
        """For the classifier; the client gets other words."""
        fault = Fault(502, "overloaded", "words")

        with pytest.raises(InBandFault) as raised:
            gate().admit(frames(TEXT, fault))
        assert raised.value.fault is fault

    def test_an_error_after_the_finish_is_dropped(self) -> None:
        """The answer is whole; only its frame stays behind."""
        passed = gate().admit(frames(TEXT, STOP, Fault(500, "", ""), End()))

        assert events_of(passed) == [TEXT, STOP, End()]


class TestTranscript:
    def test_it_keeps_what_recovery_needs(self) -> None:
        """The text, whether there were calls, and whether it came to an end."""
        transcript = Transcript()
        transcript.fold([START, THOUGHT, TEXT, TextDelta(0, "Then"), CALL, *ARGUMENTS, CALLED, End()])

        assert transcript.text == "I look. Then"
        assert (transcript.calls, transcript.reasoning, transcript.finished, transcript.ended) == (1, True, True, True)
        assert transcript.start is START

    @pytest.mark.parametrize(
        ("events", "committed"),
        [([], False), ([START, THOUGHT], False), ([TextDelta(0, " \n")], False), ([TEXT], True), ([CALL], True)],
    )
    def test_words_and_calls_cannot_be_unsaid(self, events: list[Event], committed: bool) -> None:
        """Thinking and blank text can be begun anew."""
        transcript = Transcript()
        transcript.fold(events)

        assert transcript.committed is committed
        assert transcript.begun is bool(events)

    def test_text_beyond_the_bound_is_not_kept(self) -> None:
        """And says so, rather than keeping a part."""
        transcript = Transcript()
        transcript.fold([TextDelta(0, "x" * TEXT_CHARACTERS_MAX)])
        before = transcript.text
        transcript.fold([TextDelta(0, "x")])

        assert before is not None
        assert transcript.text is None
        assert transcript.committed


PIECES = st.sampled_from(['{"city"', ': "Oslo"', "}", "{}", "", " ", ",}", "```", '"', "\\"])
EVENTS = st.one_of(
    st.just(START),
    st.sampled_from(["word ", "\n", "x"]).map(lambda text: TextDelta(0, text)),
    st.just(THOUGHT),
    st.tuples(st.integers(0, 2), PIECES).map(lambda pair: ToolDelta(*pair)),
    st.tuples(st.integers(0, 2), st.sampled_from(["weather", "dance", ""])).map(
        lambda pair: ToolStart(pair[0], f"call_{pair[0]}", pair[1])
    ),
    st.just(USAGE),
    st.sampled_from(["stop", "tool_calls", "length"]).map(Finish),  # type: ignore[arg-type]
    st.just(End()),
    st.just(Fault(500, "", "")),
)


def released(opened: Gate, batches: Iterable[list[Frame]]) -> tuple[list[Event], str]:
    """All that left, and what was refused."""
    passed: list[Event] = []
    for batch in batches:
        try:
            passed += events_of(opened.admit(batch))
        except BadAnswer as bad:
            return passed + events_of(opened.passed), bad.code
        except InBandFault:
            return passed + events_of(opened.passed), "fault"
    return passed, ""


class TestLaws:
    @given(
        st.lists(EVENTS, max_size=14),
        st.booleans(),
        st.lists(st.integers(0, 14), max_size=6),
        st.sampled_from([frozenset(), SCHEMA_CODES, frozenset({CUT_CALL, EMPTY_ANSWER})]),
    )
    def test_how_frames_arrive_makes_no_difference(
        self, events: list[Event], whole: bool, cuts: list[int], forgiven: frozenset[str]
    ) -> None:
        """All in one read, or one by one, or anything between."""
        given = frames(*events)
        places = [0, *sorted(place for place in cuts if place < len(given)), len(given)]
        batches = [given[start:stop] for start, stop in pairwise(places)]

        outcomes = [
            released(gate(whole=whole, forgiven=forgiven), one) for one in ([given], batches, map(list, zip(given)))
        ]

        assert outcomes[0] == outcomes[1] == outcomes[2]

    @given(st.lists(EVENTS, max_size=14), st.sampled_from([frozenset(), SCHEMA_CODES | {CUT_CALL, EMPTY_ANSWER}]))
    def test_no_call_leaves_that_cannot_be_read(self, events: list[Event], forgiven: frozenset[str]) -> None:
        """What leaves of calls is whole, with a name, and JSON."""
        passed, _ = released(gate(forgiven=forgiven), [frames(*_one_start_each(events))])
        arguments: dict[int, str] = {}
        for event in passed:
            if isinstance(event, ToolStart):
                assert event.name
                arguments[event.index] = ""
            elif isinstance(event, ToolDelta):
                arguments[event.index] += event.arguments

        assert all(isinstance(json.loads(text), dict) for text in arguments.values())

    @given(st.lists(EVENTS, max_size=14))
    def test_what_leaves_unaltered_is_a_beginning_of_what_came(self, events: list[Event]) -> None:
        """Nothing overtakes, nothing is left out, but errors after the end."""
        opened = gate()
        passed, _ = released(opened, [frames(*events)])
        came = [event for event in events if not isinstance(event, Fault)]

        if not opened.altered:
            assert passed == came[: len(passed)]


def _one_start_each(events: Sequence[Event]) -> list[Event]:
    """Decoders announce each call once, and finish once; nothing of a call follows its finish."""
    seen: set[int] = set()
    kept: list[Event] = []
    for event in events:
        if isinstance(event, ToolStart):
            if event.index in seen:
                continue
            seen.add(event.index)
        kept.append(event)
        if isinstance(event, Finish):
            break
    return kept
