"""placeholder"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from routerd.canonical import COMPLETE
from routerd.proxy.simulated import Answer, Received


def gone_on_with(answer: Answer, request: Received, wordings: Sequence[str] = ()) -> Answer:
    """What a model says to this request: its answer, or the rest of one that broke off.

    It goes on with its own text, or with one of the other ``wordings`` it finds begun.
    """
    shown = _shown(request.body["messages"])
    if shown is None:
        return answer
    text = next((text for text in (answer.text or "", *wordings) if text.startswith(shown)), "")
    rest = text[len(shown) :]
    nothing = "" if request.body["messages"][-1]["role"] == "assistant" or answer.calls else COMPLETE
    return msgspec.structs.replace(answer, text=rest or nothing)


def _shown(messages: list[dict[str, Any]]) -> str | None:
    """The part of an answer that is to be gone on with; None if that is not what is asked."""
    if messages[-1]["role"] == "assistant":
        return str(messages[-1]["content"])
    asked = len(messages) > 1 and messages[-2]["role"] == "assistant" and COMPLETE in str(messages[-1]["content"])
    return str(messages[-2]["content"]) if asked else None
