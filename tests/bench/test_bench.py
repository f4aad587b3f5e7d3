"""The bench's own instruments and arithmetic: a figure is worth what they are worth."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from routerd.canonical import End, Finish, TextDelta
from routerd.dialects import DIALECTS
from tests.bench import front, instruments, machine, relaying, scenarios, server
from tests.bench.bodies import FORMS, Body
from tests.bench.figures import Row, Samples, at_least, at_most, crossing, recovering
from tests.bench.front import Upstream
from tests.bench.instruments import Instruments, Result, Shape
from tests.bench.report import Report, shown
from tests.bench.rounds import Pace, Rounds
from tests.bench.targets import SPOKEN, Direct, Given, Nginx, Routerd, Target

CORE = machine.pick_cores().load


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Instruments:
    try:
        return instruments.build(tmp_path_factory.mktemp("instruments"), CORE)
    except instruments.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def upstream(tools: Instruments) -> Iterator[Upstream]:
    with tools.upstream() as port:
        yield Upstream("127.0.0.1", port)


def load(tools: Instruments, upstream: Upstream, body: Body, shape: Shape, expected: int | None = None) -> Result:
    with server.running(Direct(), upstream, CORE) as direct:
        events = (expected or body.events) if body.stream else None
        return instruments.finish_load(tools.start_load(direct.address(body), shape, body.mark, events), shape)


# --- instruments ----------------------------------------------------------------------------------------------------


def test_whole_answers_count(tools: Instruments, upstream: Upstream) -> None:
    """Small answers over kept connections are all right, and take some time."""
    result = load(tools, upstream, Body("small"), Shape(4, seconds=0.1))

    assert result.ok > 10
    assert result.errors == 0
    assert list(result.statuses) == ["200"]
    assert 0 < result.answer_p50_ms <= result.answer_p99_ms < 100


def test_every_event_is_seen_once(tools: Instruments, upstream: Upstream) -> None:
    """Paced streams are begun within the ramp, and each event's way through is timed."""
    body = Body("slow", stream=True, events=5, gap_ms=20, burst=1)

    result = load(tools, upstream, body, Shape(20, ramp_ms=50))

    assert (result.ok, result.errors, result.events) == (20, 0, 100)
    assert 0 < result.first_p50_ms < 1000
    assert 0 < result.transit_p50_ms <= result.transit_p99_ms
    assert 60 <= result.answer_p50_ms < 1000


def test_fast_streams_arrive_whole(tools: Instruments, upstream: Upstream) -> None:
    """Streams that fill the sockets are neither cut nor mixed up."""
    result = load(tools, upstream, Body("fast", stream=True, events=3000, event_bytes=500), Shape(4, ramp_ms=1))

    assert (result.ok, result.errors, result.events) == (4, 0, 12_000)


def test_a_missing_event_is_an_error(tools: Instruments, upstream: Upstream) -> None:
    """A stream that ends well but has fewer events than were asked for is not right."""
    result = load(tools, upstream, Body("short", stream=True, events=4), Shape(1, ramp_ms=1), expected=5)

    assert (result.ok, result.errors) == (0, 1)


def test_what_is_open_at_the_deadline_is_an_error(tools: Instruments, upstream: Upstream) -> None:
    """A stalled stream ends the run in time and does not count as an answer."""
    body = Body("stalled", stream=True, events=2, gap_ms=60_000, burst=1)

    result = load(tools, upstream, body, Shape(3, ramp_ms=1, deadline_s=0.2))

    assert (result.ok, result.errors, result.timeouts) == (0, 3, 3)
    assert result.wall_s < 5


def test_nobody_there_is_an_error(tools: Instruments) -> None:
    """A refused connection counts, and does not hang."""
    nobody = Upstream("127.0.0.1", machine.free_port())

    result = load(tools, nobody, Body("small"), Shape(2, ramp_ms=1, deadline_s=1))

    assert (result.ok, result.errors) == (0, 2)


@pytest.mark.parametrize("dialect", SPOKEN)
def test_every_dialect_is_played(dialect: str, tools: Instruments, upstream: Upstream) -> None:
    """The upstream answers in the dialect of the path; what repeats the text at the end counts once."""
    result = load(tools, upstream, Body("any", stream=True, events=40, burst=7, dialect=dialect), Shape(2, ramp_ms=1))

    assert (result.ok, result.errors, result.events) == (2, 0, 80)


@pytest.mark.parametrize("dialect", SPOKEN)
def test_what_is_played_is_a_healthy_stream(dialect: str, tools: Instruments, upstream: Upstream) -> None:
    """Our own decoder finds each text once, a reason to end and the terminal marker."""
    body = Body("any", stream=True, events=5, dialect=dialect)
    connection = http.client.HTTPConnection("127.0.0.1", upstream.port)
    connection.request("POST", "/v1" + FORMS[dialect].path, body.encode("mock"))
    decoder = DIALECTS[dialect].decoder()

    with contextlib.closing(connection):
        frames = decoder.feed(connection.getresponse().read()) + decoder.close()

    kinds = [type(event) for frame in frames for event in frame.events]
    assert kinds.count(TextDelta) == body.events
    assert kinds.count(Finish) == kinds.count(End) == 1


@pytest.mark.parametrize("extra_bytes", [0, 100_000])
def test_bodies_are_what_they_say(extra_bytes: int) -> None:
    """A body is JSON of about its size, and carries the behaviour wanted of the upstream."""
    sent = Body("any", stream=True, events=7, extra_bytes=extra_bytes).encode("m")

    assert extra_bytes <= len(sent) < extra_bytes + 5000
    assert json.loads(sent)["stream"] is True
    assert "[[events=7 " in json.loads(sent)["messages"][0]["content"]


def test_cpu_of_ended_threads_and_children_counts() -> None:
    """What a server's threads and children used is not lost when they end."""
    burn = "import time; [None for _ in iter(lambda: time.process_time() < 0.2, False)]"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}]); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        used_s = machine.cpu_s(process.pid)
        process.communicate(b"\n")

    assert 0.18 <= used_s < 5


def test_memory_and_owner_of_a_server_are_found(tools: Instruments) -> None:
    """A server that somebody else started is found by its port, and its memory can be read."""
    with tools.upstream() as port:
        pid = machine.listener_of(port)
        assert pid is not None
        assert 0 < machine.pss_kb(pid) < 100_000


@pytest.mark.real
@pytest.mark.skipif(bool(front.why_not()), reason=front.why_not())
@pytest.mark.parametrize("way", ["plain", "tls"])
def test_a_proxy_is_measured_through_either_side_of_the_front(
    way: str, tools: Instruments, upstream: Upstream, tmp_path: Path
) -> None:
    """A proxy is started before a plain and a TLS upstream, answers through both, and its cost is seen."""
    scenario = scenarios.Scenario("any", server.SMALL, Shape(2, seconds=0.1))
    with (
        front.running(upstream.port, CORE, tmp_path) as (plain, tls),
        server.running(Nginx(), tls if way == "tls" else plain, CORE) as nginx,
    ):
        figures = scenarios.measure(tools, nginx, scenario)

    assert figures["errors"] == 0
    assert figures["cpu_us_per_request"] > 0


# --- the daemon -------------------------------------------------------------------------------------------------------


def test_translated_streams_and_recovery_are_measured(tools: Instruments, upstream: Upstream) -> None:
    """In the shortest form: streams between each two dialects come whole, and recovery is compared with none."""
    shortest = Pace(rounds=1, fresh_rounds=1, cold_rounds=1, seconds=0.1, open_s=0.1, warm_s=0.02)
    rounds = Rounds(tools, machine.pick_cores(), shortest, upstream, [Direct(), Routerd()])
    steady = [one for one in scenarios.steady(shortest.seconds) if one.name == "coalesced"]
    rounds.run([*steady, *scenarios.crossing(shortest.seconds), *scenarios.recovery(shortest.seconds)])
    report = Report("here", {"direct": "", "routerd": ""}, {}, rounds.samples, rounds.skipped)
    shown_rows = {row.title for row in report.rows()}

    assert rounds.skipped == {}
    assert {figures["errors"] for by in rounds.samples.values() for each in by.values() for figures in each
            if "errors" in figures} == {0.0}  # fmt: skip
    for down, up in itertools.product(SPOKEN, repeat=2):
        assert {row.title for row in crossing(down, up)} <= shown_rows
    assert {row.title for row in recovering() if row.scenario == scenarios.RECOVERY} <= shown_rows


def test_recovery_holds_no_text() -> None:
    """What comes of a healthy text goes on at once; and what recovery does to it is timed."""
    samples = relaying.measure()

    assert set(samples) >= {"relay_chat_alone", "relay_messages_burst"}
    assert {figures["held"] for by in samples.values() for each in by.values() for figures in each} == {0.0}
    assert all(figures["bare_us"] > 0 for by in samples.values() for each in by.values() for figures in each)


# --- arithmetic -----------------------------------------------------------------------------------------------------

SAMPLES: Samples = {
    "c1": {
        "direct": [{"answer_p50_ms": 1.0}, {"answer_p50_ms": 3.0}, {"answer_p50_ms": 2.0}],
        "routerd": [{"answer_p50_ms": 1.5}, {"answer_p50_ms": 3.1}, {"answer_p50_ms": 2.3}],
        "nginx": [{"answer_p50_ms": 1.1}, {"answer_p50_ms": 3.1}, {"answer_p50_ms": 2.1}],
    }
}
ADDED = Row("added", "c1", "answer_p50_ms", at_most(0.25), "c1")


def test_added_is_taken_round_by_round() -> None:
    """A round in which the whole machine was slow does not show in the difference."""
    assert ADDED.rounds(SAMPLES, "routerd") == pytest.approx([0.5, 0.1, 0.3])
    assert ADDED.median(SAMPLES, "routerd") == pytest.approx(0.3)
    assert ADDED.median(SAMPLES, "direct") is None
    assert ADDED.spread_percent(SAMPLES, "routerd") == pytest.approx(100 * 0.2 / 0.3)


def test_the_report_judges_routerd_only() -> None:
    """A goal is missed or met by routerd's median; others are shown as multiples of it; who is left out is named."""
    versions = {"direct": "", "nginx": "1.2", "routerd": "0", "litellm": ""}
    report = Report("here", versions, {}, SAMPLES, {"litellm": "no pip"})

    assert report.targets == ["direct", "nginx", "routerd"]
    assert (report.verdict(ADDED), report.ratio(ADDED, "nginx")) == ("MISS", "0.333x")
    assert "skipped litellm: no pip" in report.table()
    assert "goals missed: 1 connection: added p50, ms" not in report.table()  # 0.3 ms are within that goal
    assert json.loads(report.json())["samples"]["c1"]["nginx"][0] == {"answer_p50_ms": 1.1}


def test_what_recovery_adds_is_taken_round_by_round() -> None:
    """Against the same daemon without it, in the same round; a figure that is missing takes no other with it."""
    ours = {"cpu_us_per_event": 3.3, "transit_p50_ms": 0.5}
    bare = {"cpu_us_per_event": 3.0, "transit_p50_ms": 0.4}
    samples: Samples = {"recovery_slow": {"routerd": [ours, ours], "bare": [bare, ours]}}

    first, second = scenarios.recovery_figures(samples)

    assert first == pytest.approx({"slow_percent": 10.0, "late_ms": 0.1})
    assert second == pytest.approx({"slow_percent": 0.0, "late_ms": 0.0})


def test_goals_are_bounds_from_either_side() -> None:
    assert (at_most(2).met(2), at_most(2).met(3)) == (True, False)
    assert (at_least(2).met(2), at_least(2).met(1)) == (True, False)
    assert str(at_least(80_000)) == "≥ 80,000"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (12345.6, "12,346"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.5, "0.5")],
)
def test_three_digits_are_shown(value: float | None, text: str) -> None:
    assert text == shown(value)


def test_a_given_server_is_parsed_or_refused() -> None:
    """``--target`` takes a name, a URL with a port, and a model and a token if need be."""
    given: Target = Given.parse("mine=http://127.0.0.1:9/v1,model=m,token=t")

    launch = given.launch(Upstream("127.0.0.1", 1), 0, Path())

    assert (launch.port, launch.path(Body("any")), launch.model(Body("any"))) == (9, "/v1/chat/completions", "m")
    assert launch.headers == ("Authorization: Bearer t",)
    for wrong in ("mine", "mine=http://127.0.0.1/v1", "mine=http://127.0.0.1:9/v1,colour=red"):
        with pytest.raises(ValueError, match=wrong):
            Given.parse(wrong)


def test_other_programs_are_noticed() -> None:
    """What the machine did meanwhile, less what we did, is not negative."""
    others = machine.Others.watch()
    deadline = time.monotonic() + 0.05
    while time.monotonic() < deadline:
        pass

    assert others.percent() >= 0
