"""The requests that are sent: what an agent sends, with the wanted behaviour of the upstream in the system prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

SOURCE_FILE = 'def parse(text):\n    return {"text": text, "né": [1, 2, 3]}  # it\'s "quoted"\n' * 20


@dataclass(frozen=True)
class Body:
    """One request. ``extra_bytes``: of earlier tool calls and their results, as a long turn of an agent has them."""

    name: str
    stream: bool = False
    events: int = 16
    gap_ms: int = 0
    burst: int = 16
    event_bytes: int = 80
    extra_bytes: int = 0

    def encode(self, model: str) -> bytes:
        request: dict[str, Any] = {"model": model, "messages": self._messages()}
        if self.stream:
            request |= {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(request, ensure_ascii=False, separators=(",", ":")).encode()

    def _messages(self) -> list[dict[str, Any]]:
        wanted = f"[[events={self.events} gap_ms={self.gap_ms} burst={self.burst} bytes={self.event_bytes}]]"
        system = {"role": "system", "content": f"{wanted} You are a careful agent."}
        user = {"role": "user", "content": "Look into the files below and say what they do. " + "Be exact. " * 25}
        return [system, user, *self._earlier_turns()]

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
