"""Real Hermes in front of a provider that breaks off in mid-answer: the task is done, and nothing is said twice.

Each row is one fault, and runs Hermes twice side by side: once over a provider that has it in the first request that
can have it, and once over one that has it every time; behind either there is a healthy one, with other words for the
same thing. What the fault cost is read from the daemon's log, so the load of the machine does not count.

In chat mode both providers speak chat. In Responses mode the faulty one speaks Responses and the healthy one chat, so
that what passed as it came is gone on with in our own words.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from routerd.proxy.scripts import gone_on_with
from routerd.proxy.simulated import Answer, Fault, Received, Turn
from tests.fakes import ScriptedUpstream, call
from tests.hermes_rig import ApiMode, HermesResult, run_hermes
from tests.responses_fake import ResponsesUpstream
from tests.rig import Daemon, config_text, daemon

pytestmark = [pytest.mark.hermes, pytest.mark.xdist_group("hermes-recovery"), pytest.mark.timeout(240)]

PROMPT = "Write the report with the terminal tool."
WRITE = call("terminal", command="echo written >> report.txt")
FIRST = Answer(
    text="I write the report now, with the terminal tool.",
    calls=(WRITE,),
    final_text="The report is written, and I have read it again.",
    piece=8,
    pace_s=0.002,
)
OTHER = Answer(text="Let me write that report.", calls=(WRITE,), final_text="It is done: the report is there.")
TURNS = 2  # the call, and the final answer
LIMIT_S = 1.0  # for silence
ALLOWED_S = 2.0  # what a faulty provider may cost a task beyond that
SETTINGS = f'first_token_timeout = "{LIMIT_S}s"\nstall_timeout = "{LIMIT_S}s"\n'


class Case(NamedTuple):
    """A fault, and which of the two turns can have it: the one with the call, or the final answer."""

    fault: Fault
    in_call_turn: bool = True


CASES = {
    "RST mid-text": Case(Fault("reset", "mid_text")),
    "RST mid-call": Case(Fault("reset", "mid_call")),
    "RST mid-answer": Case(Fault("reset", "mid_text"), in_call_turn=False),
    "FIN in mid-call": Case(Fault("tear", "mid_call")),
    "clean EOF mid-answer": Case(Fault("eof", "mid_text"), in_call_turn=False),
    "clean EOF mid-call": Case(Fault("eof", "mid_call")),
    "error event mid-answer": Case(Fault("error", "mid_text"), in_call_turn=False),
    "error event mid-call": Case(Fault("error", "mid_call")),
    "bad arguments": Case(Fault("bad_arguments")),
    "cut arguments": Case(Fault("cut_arguments")),
    "stall mid-text": Case(Fault("stall", "mid_text")),
    "stall mid-call": Case(Fault("stall", "mid_call")),
    "malformed line": Case(Fault("malformed", "mid_text")),
}


FAULTY: dict[ApiMode, type[ScriptedUpstream]] = {
    "chat_completions": ScriptedUpstream,
    "codex_responses": ResponsesUpstream,
}


def breaking(case: Case, *, always: bool) -> Callable[[Received], Turn]:
    """A model that has the fault in every turn that can have it, or only the first time."""
    had: list[Received] = []

    def step(request: Received) -> Turn:
        answer = gone_on_with(FIRST, request, (OTHER,))
        fits = request.chat.after_tools != case.in_call_turn and answer is FIRST
        if not fits or (had and not always):
            return Turn(answer)
        had.append(request)
        return Turn(answer, case.fault)

    return step


class Run(NamedTuple):
    """A Hermes run that has ended, and the daemon it ran through."""

    home: Path
    result: HermesResult
    served: Daemon

    def assert_done(self) -> None:
        """The task is done, once, and Hermes has noticed nothing: each text stands in the history as somebody's own."""
        result = self.result
        assert result.completed, result.log
        assert (self.home / "report.txt").read_text() == "written\n"
        assert result.usage["api_calls"] == TURNS, result.log
        assert [turn["role"] for turn in result.history] == ["user", "assistant", "tool", "assistant"]
        assert result.history[1]["content"] in (FIRST.text, OTHER.text)
        assert len(result.history[1]["tool_calls"]) == 1
        assert result.final_text in (FIRST.final_text, OTHER.final_text)
        assert [line["outcome"] for line in self.served.exchanges] == ["success"] * TURNS

    @property
    def served_s(self) -> float:
        """What the daemon took for all of it."""
        return float(sum(line["duration_s"] for line in self.served.exchanges))


async def run(case: Case, mode: ApiMode, home: Path, *, always: bool) -> Run:
    """One task through a daemon of its own."""

    def healthy(request: Received) -> Turn:
        return Turn(gone_on_with(OTHER, request, (FIRST,)))

    async with (
        FAULTY[mode](breaking(case, always=always)) as first,
        ScriptedUpstream(healthy) as second,
        daemon(config_text({"first": first, "second": second}, defaults=SETTINGS), home.parent) as served,
    ):
        return Run(home, await run_hermes(f"{served.url}/v1", PROMPT, hermes_home=home, api_mode=mode), served)


@pytest.mark.parametrize("mode", FAULTY)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_a_break_in_mid_answer_is_not_noticed(
    case: Case, mode: ApiMode, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Whether it happens once or every time, the task is done, the texts are whole, and it costs seconds at most."""
    began = time.monotonic()
    once, always = await asyncio.gather(
        run(case, mode, tmp_path / "once", always=False), run(case, mode, tmp_path / "always", always=True)
    )
    took_s = time.monotonic() - began
    record_property(
        "seconds", f"added once {once.served_s:5.2f}  always {always.served_s:5.2f}  both runs {took_s:5.2f}"
    )
    once.assert_done()
    always.assert_done()
    watched_s = LIMIT_S if case.fault.kind == "stall" else 0.0
    for one in (once, always):
        assert one.served_s < watched_s + ALLOWED_S
