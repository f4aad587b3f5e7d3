"""The requests that are sent: what an agent sends, with the wanted behaviour of the upstream in the system prompt.

A body is in the client's dialect; ``upstream`` is that of the server it is meant for. What is said of a dialect here
(``FORMS``) is all the bench has to know of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SOURCE_FILE = 'def parse(text):\n    return {"text": text, "né": [1, 2, 3]}  # it\'s "quoted"\n' * 20


QUESTION = "Look into the files below and say what they do. " + "Be exact. " * 25
MARK_OF_ANSWER = "The end."


@dataclass(frozen=True)
class Form:
    """A dialect. ``path`` comes after ``/v1``; ``mark`` ends a whole stream and nothing else in it begins like it."""

    path: str
    mark: str
    request: Callable[[str, str], dict[str, Any]]  # of a system prompt and a question
    streaming: dict[str, Any]


def chat_request(system: str, question: str) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": system}, {"role": "user", "content": question}]}


def messages_request(system: str, question: str) -> dict[str, Any]:
    return {"max_tokens": 4096, "system": system, "messages": [{"role": "user", "content": question}]}


def responses_request(system: str, question: str) -> dict[str, Any]:
    return {"instructions": system, "input": [{"role": "user", "content": question}]}


FORMS = {
    "chat": Form("/chat/completions", "[DONE]", chat_request, {"stream_options": {"include_usage": True}}),
    "messages": Form("/messages", "message_stop", messages_request, {}),
    "responses": Form("/responses", "response.completed", responses_request, {}),
}


@dataclass(frozen=True)
class Body:
    """One request. ``extra_bytes``: of earlier tool calls and their results, as a long turn of an agent has them.

    ``tools``: so many are offered, each with a schema of some kB. Both only in chat. No ``upstream``: the client's own.
    """

    name: str
    stream: bool = False
    events: int = 16
    gap_ms: int = 0
    burst: int = 16
    event_bytes: int = 80
    extra_bytes: int = 0
    tools: int = 0
    dialect: str = "chat"
    upstream: str = ""

    @property
    def served_in(self) -> str:
        """The dialect of the upstream."""
        return self.upstream or self.dialect

    @property
    def mark(self) -> str:
        """What a whole answer ends with."""
        return FORMS[self.dialect].mark if self.stream else MARK_OF_ANSWER

    def encode(self, model: str) -> bytes:
        wanted = f"[[events={self.events} gap_ms={self.gap_ms} burst={self.burst} bytes={self.event_bytes}]]"
        request = {"model": model} | FORMS[self.dialect].request(f"{wanted} You are a careful agent.", QUESTION)
        if self.extra_bytes:
            request["messages"] += self._earlier_turns()
        if self.tools:
            request["tools"] = [tool(number) for number in range(self.tools)]
        if self.stream:
            request |= {"stream": True} | FORMS[self.dialect].streaming
        return json.dumps(request, ensure_ascii=False, separators=(",", ":")).encode()

    def _earlier_turns(self) -> list[dict[str, Any]]:
        turns: list[dict[str, Any]] = []
        size = 0
        while size < self.extra_bytes:
            turn = tool_turn(len(turns))
            size += len(json.dumps(turn, ensure_ascii=False).encode())
            turns += turn
        return turns


def tool_turn(number: int) -> list[dict[str, Any]]:
    """An agent's call of a tool and the tool's answer: a file full of quotes, line ends and a few non-ASCII letters."""
    function = {"name": "read_file", "arguments": json.dumps({"path": f"/src/part_{number}.py"})}
    call = {"id": f"call_{number}", "type": "function", "function": function}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": f"call_{number}", "content": SOURCE_FILE},
    ]


def tool(number: int) -> dict[str, Any]:
    """One of an agent's tools: a long description, a dozen arguments that are told apart at length."""
    properties = {
        f"argument_{place}": {"type": "string", "description": "What it is for, and when to leave it out. " * 3}
        for place in range(12)
    }
    parameters = {"type": "object", "properties": properties, "required": ["argument_0"]}
    function = {"name": f"tool_{number}", "description": "Says what it does. " * 20, "parameters": parameters}
    return {"type": "function", "function": function}
