"""A real Chromium, driven over its DevTools protocol: what a page shows, asks for and complains about."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT_S = 30.0
LOOK_MS = 50
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)

Scheme = Literal["light", "dark"]


class Page:
    """One open page. ``requests``: every URL it asked for; ``complaints``: every error and warning in its console."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.loaded = asyncio.Event()
        self._browser = browser
        self._session = session

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        return await self._browser.send(method, session=self._session, **parameters)

    def hear(self, method: str, parameters: dict[str, Any]) -> None:
        """An event of the protocol."""
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Page.loadEventFired":
            self.loaded.set()
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.complaints.append(parameters["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(parameters["args"]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"]))

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise's, when it is there."""
        answer = await self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        look = f"if (Boolean({condition})) {{ clearInterval(timer); resolve(); }}"
        waiting = f"new Promise((resolve) => {{ const timer = setInterval(() => {{ {look} }}, {LOOK_MS}); }})"
        try:
            async with asyncio.timeout(WAIT_S):
                await self.evaluate(waiting)
        except TimeoutError:
            raise AssertionError(f"waited in vain for {condition} in:\n{await self.text()}") from None

    async def text(self, selector: str = "body") -> str:
        return str(await self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    async def look(self, *, width: int, scheme: Scheme) -> None:
        """Be so wide, by day or by night."""
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.send("Emulation.setEmulatedMedia", features=features)

    async def picture(self) -> bytes:
        """All of it, as PNG."""
        shot = await self.send("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])


class Browser:
    """A running Chromium."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._pages: dict[str, Page] = {}

    async def listen(self) -> None:
        """Hand out answers and events until the connection ends."""
        async for message in self._socket:
            heard = json.loads(message.data)
            if "id" in heard:
                self._answers.pop(heard["id"]).set_result(heard)
            elif heard.get("sessionId") in self._pages:
                self._pages[heard["sessionId"]].hear(heard["method"], heard["params"])

    async def send(self, method: str, *, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        to = {} if session is None else {"sessionId": session}
        await self._socket.send_json({"id": number, "method": method, "params": parameters, **to})
        async with asyncio.timeout(WAIT_S):
            heard = await answer
        assert "error" not in heard, heard["error"]
        result: dict[str, Any] = heard["result"]
        return result

    async def open(self, url: str) -> Page:
        """A new page, whose every request is seen from the first on."""
        target = await self.send("Target.createTarget", url="about:blank")
        attached = await self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = self._pages[attached["sessionId"]] = Page(self, attached["sessionId"])
        for domain in ("Network", "Log", "Runtime", "Page"):
            await page.send(f"{domain}.enable")
        page.loaded.clear()
        await page.send("Page.navigate", url=url)
        async with asyncio.timeout(WAIT_S):
            await page.loaded.wait()
        return page


@asynccontextmanager
async def chromium(folder: Path) -> AsyncIterator[Browser]:
    """A browser with a profile of its own in this folder, killed at the end."""
    assert CHROMIUM is not None
    process = await asyncio.create_subprocess_exec(
        CHROMIUM,
        *FLAGS,
        f"--user-data-dir={folder}",
        env={"HOME": str(folder), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    try:
        url = await _address(process.stderr)
        async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
            browser = Browser(socket)
            listening = asyncio.ensure_future(browser.listen())
            yield browser
            listening.cancel()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        async with asyncio.timeout(WAIT_S):
            await process.communicate()  # until the last of its children has let go of the pipe


async def _address(stderr: asyncio.StreamReader) -> str:
    """Where its protocol is spoken, once it has said that."""
    said = b""
    async with asyncio.timeout(WAIT_S):
        while not said.startswith(b"DevTools listening on "):
            said = await stderr.readline()
            assert said, "chromium ended before it listened"
    return said.split()[-1].decode()
