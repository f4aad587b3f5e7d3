"""Price lists in the shapes in which they are published, and a server that answers with them as told.

The entries have every field that the real ones had when they were looked at (OpenRouter's list in September 2026,
models.dev's schema in July 2026), so that what is not read is there to be passed over.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from routerd.catalog.fresh import MIN_MODELS

WAIT_S = 10.0
Json = dict[str, Any]


def list_entry(name: str, prompt: Any, completion: Any, cached: Any = None, **pricing: Any) -> Json:
    """A model in OpenRouter's list. Prices as strings, in USD per token."""
    hit = {} if cached is None else {"input_cache_read": cached}
    return {
        "id": name,
        "canonical_slug": f"{name}-20260901",
        "hugging_face_id": "",
        "name": name.upper(),
        "created": 1788220800,
        "description": "A model, in a few words: d\u00e9j\u00e0 vu.",
        "context_length": 262144,
        "architecture": {
            "modality": "text->text",
            "input_modalities": ["text"],
            "output_modalities": ["text"],
            "tokenizer": "Other",
            "instruct_type": None,
        },
        "pricing": {"prompt": prompt, "completion": completion, "request": "0", "image": "0", **hit, **pricing},
        "top_provider": {"context_length": 262144, "max_completion_tokens": None, "is_moderated": False},
        "per_request_limits": None,
        "supported_parameters": ["max_tokens", "reasoning", "temperature", "tool_choice", "tools"],
        "default_parameters": {"temperature": 1, "top_p": 0.95, "frequency_penalty": None},
        "expiration_date": None,
    }


def list_body(*entries: Any, fillers: int = MIN_MODELS, free: tuple[str, ...] = ("filler/model:free",)) -> bytes:
    """OpenRouter's list with these models, the free ones named, and so many nobody asks for."""
    rest = [list_entry(f"filler/model-{number}", "0.000001", "0.000002") for number in range(fillers)]
    rest += [list_entry(name, "0", "0") for name in free]
    return json.dumps({"data": [*entries, *rest]}).encode()


def tree_entry(name: str, **cost: Any) -> Json:
    """A model in models.dev's tree. Prices as numbers, in USD per million tokens."""
    return {
        "id": name,
        "name": name.upper(),
        "family": "some",
        "attachment": False,
        "reasoning": True,
        "reasoning_options": [{"type": "effort", "values": ["low", "medium", "high"]}],
        "tool_call": True,
        "temperature": True,
        "knowledge": "2026-01",
        "release_date": "2026-06-01",
        "last_updated": "2026-06-01",
        "modalities": {"input": ["text"], "output": ["text"]},
        "open_weights": True,
        "limit": {"context": 131072, "output": 65536},
        "cost": cost,
    }


def tree_body(branches: Mapping[str, list[Json]], *, fillers: int = MIN_MODELS) -> bytes:
    """models.dev's tree with these models below their providers, and so many nobody asks for."""
    rest = [tree_entry(f"filler-{number}", input=1, output=2) for number in range(fillers)]
    every = {"unheard-of": [tree_entry("strange", input=1, output=1)], "openai": rest, **branches}
    if "openai" in branches:
        every["openai"] = branches["openai"] + rest
    return json.dumps(
        {
            provider: {
                "id": provider,
                "env": ["SOME_API_KEY"],
                "npm": "@ai-sdk/openai-compatible",
                "api": "https://api.example.com/v1",
                "name": provider.upper(),
                "doc": "https://example.com/docs",
                "models": {one["id"]: one for one in models},
            }
            for provider, models in every.items()
        }
    ).encode()


class Page:
    """One answer. ``cut``: the connection ends after so many bytes of a body that was announced whole."""

    def __init__(self, body: bytes, *, status: int = 200, etag: str = "", cut: int | None = None) -> None:
        self.body = body
        self.status = status
        self.etag = etag
        self.cut = cut


class ScriptedFeed:
    """Answers one page after the other; the last one repeats. A page with an entity tag that is known is a 304."""

    def __init__(self, *pages: Page) -> None:
        self.pages = list(pages)
        self.requests: list[dict[str, str]] = []  # headers
        self.statuses: list[int] = []
        self._changed = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self.url = ""

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/prices", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/prices"
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    def then(self, *pages: Page) -> None:
        """Answer with these from now on."""
        self.pages = list(pages)

    async def asked(self, count: int) -> None:
        """Wait until so many requests were answered."""
        await self._until(lambda: len(self.statuses) >= count)

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(dict(request.headers))
        page = self.pages.pop(0) if len(self.pages) > 1 else self.pages[0]
        headers = {"ETag": page.etag} if page.etag else {}
        known = page.etag and request.headers.get("If-None-Match") == page.etag
        self.statuses.append(304 if known else page.status)
        self._changed.set()
        if known:
            return web.Response(status=304, headers=headers)
        if page.cut is None:
            whole = web.Response(body=page.body, status=page.status, headers=headers, content_type="application/json")
            whole.enable_compression()  # as such lists are served; for those who say that they take it
            return whole
        answer = web.StreamResponse(headers={"Content-Length": str(len(page.body))})
        await answer.prepare(request)
        await answer.write(page.body[: page.cut])
        assert request.transport is not None
        request.transport.abort()
        return answer
