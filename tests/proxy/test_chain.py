"""Conversations gone on with by name, where the other end or the disk is odd."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson

from tests.messages_fake import mixed_config
from tests.proxy import wire
from tests.proxy.wire import Heard, RawUpstream, Talk, hear
from tests.responses_fake import RESPONSES, ResponsesUpstream
from tests.rig import Daemon, daemon

ASK: dict[str, Any] = {"model": "auto", "input": "Question 1?"}
SEARCH = {"id": "ws_1", "type": "web_search_call", "status": "completed", "odd": [1.0, "ü"]}


def text_item(text: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": []}
    return {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}


def event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind, **fields}))


def answer(response_id: str, *items: dict[str, Any], listed: bool = True) -> list[bytes]:
    """A stream, on purpose of the least a server may say. Not ``listed``: the last event has no items."""
    response = {"id": response_id, "object": "response", "created_at": 1, "model": "vendor/model", "output": []}
    pieces = [event("response.created", response=response | {"status": "in_progress"})]
    for index, item in enumerate(items):
        pieces.append(event("response.output_item.added", output_index=index, item=item | {"status": "in_progress"}))
        if item["type"] == "message":
            delta = {"item_id": item["id"], "output_index": index, "content_index": 0}
            pieces.append(event("response.output_text.delta", **delta, delta=item["content"][0]["text"]))
        pieces.append(event("response.output_item.done", output_index=index, item=item))
    usage = {"input_tokens": 9, "output_tokens": 9, "total_tokens": 18}
    last = response | {"status": "completed", "output": list(items) if listed else [], "usage": usage}
    return [*pieces, event("response.completed", response=last)]


@asynccontextmanager
async def over(
    upstream: RawUpstream | ResponsesUpstream, folder: Path, *, on_disk: bool = False, max_body: str = "32MiB"
) -> AsyncIterator[Daemon]:
    text = mixed_config({"one": ("responses", upstream.base_url)})
    text = text.replace("[server]", f'[server]\nmax_body = "{max_body}"')
    if on_disk:
        text = text.replace('"memory:"', f'"sqlite:{folder}/routerd.db"')
    async with daemon(text, folder) as served:
        yield served


async def ask(served: Daemon, **fields: Any) -> Heard:
    return await hear(served.url, ASK | fields, path=RESPONSES)


def id_of(heard: Heard) -> str:
    """The id in the last event, or of the whole answer."""
    found = heard.json if heard.data.startswith(b"{") else heard.chunks[-1]["response"]
    return str(found["id"])


def saying(*streams: list[bytes]) -> RawUpstream:
    """An upstream that answers with these, one for each request; the last one repeats."""

    async def play(talk: Talk) -> None:
        await talk.stream(streams[min(len(upstream.talks), len(streams)) - 1])

    upstream = RawUpstream(play)
    return upstream


async def test_items_come_back_as_they_were(tmp_path: Path) -> None:
    """Byte for byte, also of kinds that nobody here knows, and where the last event leaves them out."""
    stream = answer("resp_a", SEARCH, text_item("Answer 1."), listed=False)
    async with saying(stream) as upstream, over(upstream, tmp_path) as served:
        first = await ask(served, stream=True)
        await ask(served, stream=True, input="Question 2?", previous_response_id=id_of(first))
        sent = upstream.talks[1].body["input"]

    assert first.data == b"".join(stream)
    assert sent[1] | {"id": "ws_1"} == SEARCH  # ids are the business of whoever is asked
    assert "Answer 1." in json.dumps(sent)


async def test_a_server_that_uses_one_id_for_all(tmp_path: Path) -> None:
    """Each answer holds all before it; an earlier one of the same name is no longer there, and nothing is mixed up."""
    streams = [answer("resp_0", text_item(f"Answer {number}.")) for number in (1, 2, 3)]
    async with saying(*streams) as upstream, over(upstream, tmp_path) as served:
        await ask(served, stream=True)
        await ask(served, stream=True, input="Question 2?", previous_response_id="resp_0")
        await ask(served, stream=True, input="Question 3?", previous_response_id="resp_0")
        sent = json.dumps(upstream.talks[2].body)

    told = ["Question 1?", "Answer 1.", "Question 2?", "Answer 2.", "Question 3?"]
    places = [sent.find(text) for text in told]
    assert -1 not in places
    assert places == sorted(places)


async def test_a_server_that_uses_one_id_in_two_conversations(tmp_path: Path) -> None:
    """Neither client is given the other's: both are told to send theirs."""
    streams = [answer("resp_0", text_item(f"Answer {number}.")) for number in (1, 2)]
    async with saying(*streams) as upstream, over(upstream, tmp_path) as served:
        await ask(served, stream=True)
        await ask(served, stream=True, input="Something else?")
        heard = await ask(served, stream=True, input="Go on.", previous_response_id="resp_0")

    assert heard.status == 400
    assert heard.json["error"]["code"] == "previous_response_not_found"
    assert len(upstream.talks) == 2


async def test_answers_written_anew_have_ids_of_their_own(tmp_path: Path) -> None:
    """Chat servers exist that count theirs: what is kept under such an id could be anybody's."""
    chunks = [wire.event({"role": "assistant", "content": "Hi."}), wire.event({}, "stop"), wire.DONE]

    async def play(talk: Talk) -> None:
        await talk.stream(chunks)

    async with (
        RawUpstream(play) as upstream,
        daemon(mixed_config({"one": ("chat", upstream.base_url)}), tmp_path) as served,
    ):
        ids = {id_of(await ask(served, stream=stream)) for stream in (True, False, True, False)}

    assert len(ids) == 4


async def test_the_whole_is_measured(tmp_path: Path) -> None:
    """A conversation that has outgrown the limit for bodies is refused as a body of that size would be."""
    async with (
        ResponsesUpstream() as upstream,
        over(upstream, tmp_path, max_body="2KiB") as served,
    ):
        first = await ask(served, input="x" * 1000)
        second = await ask(served, input="x" * 1000, previous_response_id=id_of(first))

    assert (first.status, second.status) == (200, 413)
    assert "server.max_body" in second.json["error"]["message"]
    assert len(upstream.requests) == 1


async def test_the_end_is_not_in_the_clients_hands_before_the_answer_is_kept(tmp_path: Path) -> None:
    """Many clients that ask on at once all find their answers, on disk as in memory."""
    async with ResponsesUpstream() as upstream, over(upstream, tmp_path, on_disk=True) as served:

        async def talk(number: int) -> None:
            previous = id_of(await ask(served, stream=True, input=f"Topic {number}."))
            for _ in range(3):
                heard = await ask(served, stream=True, input="Go on.", previous_response_id=previous)
                previous = id_of(heard)
                assert heard.status == 200

        await asyncio.gather(*map(talk, range(8)))

        last = [json.dumps(request.body["input"]) for request in upstream.requests[-8:]]
    assert all(text.count("Topic") == 1 for text in last)


async def test_lost_items(tmp_path: Path) -> None:
    """Where the disk has lost a part, the client is told as if nothing were left: half a conversation is none."""
    async with ResponsesUpstream() as upstream:
        async with over(upstream, tmp_path, on_disk=True) as served:
            first = await ask(served)
            second = await ask(served, previous_response_id=id_of(first))
        with contextlib.closing(sqlite3.connect(tmp_path / "routerd.db")) as database, database:
            oldest = "SELECT key FROM rows WHERE kind = 'answer_items' ORDER BY wall LIMIT 1"
            database.execute(f"DELETE FROM rows WHERE kind = 'answer_items' AND key IN ({oldest})")
        async with over(upstream, tmp_path, on_disk=True) as served:
            heard = await ask(served, previous_response_id=id_of(second))

    assert heard.status == 400
    assert heard.json["error"]["code"] == "previous_response_not_found"


async def test_nothing_of_it_is_readable_on_disk_by_name(tmp_path: Path) -> None:
    """Rows are named by digests: neither an id nor a token stands there."""
    async with ResponsesUpstream() as upstream, over(upstream, tmp_path, on_disk=True) as served:
        first = await ask(served)
    with contextlib.closing(sqlite3.connect(tmp_path / "routerd.db")) as database:
        rows = database.execute("SELECT key FROM rows WHERE kind LIKE 'answer%'").fetchall()

    assert len(rows) == 2
    assert not [key for (key,) in rows if id_of(first) in key]
