"""What a scripted model says when it is asked to go on with an answer that broke off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from routerd.canonical import COMPLETE
from routerd.proxy.simulated import Answer, Received


def gone_on_with(answer: Answer, request: Received, others: Sequence[Answer] = ()) -> Answer:
    """What a model says to this request: its answer, or the rest of one that broke off.

    It goes on with its own text, or with that of one of the ``others`` it finds begun.
    """
    messages = request.body["messages"]
    shown = _shown(messages)
    if shown is None:
        return answer
    for one in (answer, *others):
        for text, calls in ((one.text, answer.calls), (one.final_text, ())):
            if text is not None and text.startswith(shown):
                nothing = "" if messages[-1]["role"] == "assistant" or calls else COMPLETE
                return msgspec.structs.replace(answer, text=text[len(shown) :] or nothing, calls=calls)
    return answer


def _shown(messages: list[dict[str, Any]]) -> str | None:
    """The part of an answer that is to be gone on with; None if that is not what is asked."""
    if messages[-1]["role"] == "assistant":
        return str(messages[-1]["content"])
    asked = len(messages) > 1 and messages[-2]["role"] == "assistant" and COMPLETE in str(messages[-1]["content"])
    return str(messages[-2]["content"]) if asked else None
