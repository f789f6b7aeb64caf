"""GET /events: everything that happens, in order, to whom it concerns, and nothing skipped."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

import pytest

from kpmd.api import events as events_api
from kpmd.runtime import journal
from tests.fakes.kernel import FakeKernel
from tests.http.actor import NOBODY, Actor
from tests.http.contract import NDJSON, SSE
from tests.http.samples import Gate, a_link, a_program, link
from tests.http.serving import Client, Served, raw, until
from tests.http.streaming import Cut, Stream, listening, told

Actors = Callable[..., Awaitable[Actor]]
Serve = Callable[..., Awaitable[Served]]

CONNECTION = {"kind": "connection"}

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user")


def listeners(served: Served) -> int:
    return sum(len(scope.listeners) for scope in served.state.journal._scopes.values())


async def make_and_end(client: Client) -> str:
    """Two events of a lease: its id."""
    made = await client.post("/leases", {"ttl": 60})
    await client.delete(f"/leases/{made['id']}")
    id_: str = made["id"]
    return id_


@pytest.mark.every_loop
async def test_what_is_made_and_ends_is_told_in_order_and_why(
    served: Served, client: Client
) -> None:
    await client.get("/healthz")
    async with listening(served.path) as stream:
        assert (stream.status, stream.content_type) == (200, NDJSON)
        lease = (await client.post("/leases", {"ttl": 60}))["id"]
        program = await a_program(client)
        made = await a_link(client, program, lifetime={"kind": "lease", "lease": lease})
        owner = (await client.get(f"/links/{made}"))["client"]
        await client.delete(f"/leases/{lease}")
        await client.delete(f"/programs/{program}")
        found = await stream.until("ended", program)
    # The test itself has two connections, but is one process.
    assert told(found) == [
        ("lease", "created", None),
        ("program", "created", None),
        ("link", "created", None),
        ("link", "detaching", "lease-ended"),
        ("lease", "ended", "lease-ended"),
        ("link", "ended", "lease-ended"),
        ("program", "ended", "deleted"),
    ]
    by_what = {each["what"]: each for each in found}
    assert by_what["link"] | {"seq": "", "time": ""} == {
        "seq": "",
        "time": "",
        "what": "link",
        "event": "ended",
        "id": made,
        "uid": os.getuid(),
        "reason": "lease-ended",
        "client": owner,
        "program": program,
        "kind": "kprobe",
        "count": 1,
    }
    assert by_what["program"]["name"] == "probe"
    assert {each["client"] for each in found} == {owner}
    assert len({each["seq"] for each in found}) == len(found)
    times = [datetime.fromisoformat(each["time"]) for each in found]
    assert times == sorted(times)


async def test_clients_come_and_go(served: Served, client: Client, actor: Actors) -> None:
    await client.get("/healthz")
    async with listening(served.path) as stream:
        passing, dying = await actor(), await actor()
        await passing.get("/healthz")
        await dying.get("/healthz")
        await passing.do("close", 0)
        (came, came_too, gone) = [await stream.next() for _ in range(3)]
        assert told([came, came_too, gone]) == [
            ("client", "created", None),
            ("client", "created", None),
            ("client", "ended", "connection-closed"),
        ]
        assert (came["pid"], came["command"]) == (passing.pid, gone["command"])
        assert came["id"] == gone["id"]
        await a_program(dying)
        dying.kill()
        rest = await stream.until("ended", came_too["id"])
    assert told(rest) == [
        ("program", "created", None),
        ("program", "ended", "client-gone"),
        ("client", "ended", "client-gone"),
    ]


async def test_reasons(served: Served, client: Client, actor: Actors) -> None:
    """Every way in which a link can end has a word of its own."""
    child = await actor()
    program = await a_program(client)
    async with listening(served.path) as stream:
        ends = [
            await a_link(client, program),
            await a_link(client, await a_program(client)),
            await a_link(child, program, lifetime=CONNECTION),
            await a_link(child, program),
            await a_link(child, program),
        ]
        short = await client.post("/leases", {"ttl": 0.01})
        await client.delete(f"/links/{ends[0]}")
        second = (await client.get(f"/links/{ends[1]}"))["program"]
        await client.delete(f"/programs/{second}?force=true")
        owner = (await client.get(f"/links/{ends[3]}"))["client"]
        await child.do("close", 0)
        await until(lambda: served.state.registry.links.get(ends[2]) is None)
        await client.delete(f"/links/{ends[4]}")
        await client.delete(f"/clients/{owner}")
        await until(lambda: len(served.state.registry.leases) == 0)
        found = await stream.until("ended", await make_and_end(client))
    reasons = {each["id"]: each["reason"] for each in found if each["event"] == "ended"}
    assert [reasons[id_] for id_ in ends] == [
        "deleted",
        "program-deleted",
        "connection-closed",
        "client-released",
        "deleted",
    ]
    assert reasons[second] == "deleted"
    assert reasons[short["id"]] == "lease-expired"


async def test_server_sent_events(served: Served, client: Client) -> None:
    async with listening(served.path, headers={"Accept": "text/event-stream"}) as stream:
        assert stream.content_type == SSE
        lease = await make_and_end(client)
        first, second = await stream.until("ended", lease)
    # As a browser takes up again: with the id of the last event that it had.
    again = {"Accept": "text/event-stream", "Last-Event-ID": first["seq"]}
    async with listening(served.path, headers=again) as stream:
        assert await stream.next() == second


async def test_server_sent_events_keep_the_connection_from_looking_dead(
    served: Served, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_api, "_SILENCE", 0.01)
    async with listening(served.path, headers={"Accept": "text/event-stream"}) as stream:
        assert await stream._chunk() == b":\n\n"
        assert await stream._chunk() == b":\n\n"
        lease = await make_and_end(client)
        assert len(await stream.until("ended", lease)) == 2


async def test_a_silent_stream_of_lines_stays_silent_and_open(
    served: Served, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_api, "_SILENCE", 0.01)
    async with listening(served.path) as stream:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await stream._chunk()
        lease = await make_and_end(client)
        assert len(await stream.until("ended", lease)) == 2


async def test_it_resumes_exactly_behind_an_event(served: Served, client: Client) -> None:
    async with listening(served.path) as stream:
        for _ in range(5):
            last = await make_and_end(client)
        found = await stream.until("ended", last)
    assert len(found) == 10
    for place, event in enumerate(found):
        headers = {"Last-Event-ID": event["seq"]}
        if place < 9:
            async with listening(served.path, f"?since={event['seq']}") as stream:
                assert await stream.until("ended", last) == found[place + 1 :]
            async with listening(served.path, headers=headers) as stream:
                assert await stream.until("ended", last) == found[place + 1 :]
    # Behind the last one: what comes next, and nothing before.
    async with listening(served.path, f"?since={found[-1]['seq']}") as stream:
        another = await make_and_end(client)
        assert {each["id"] for each in await stream.until("ended", another)} == {another}
    # What is asked for counts more than what the browser remembers.
    async with listening(
        served.path, f"?since={found[7]['seq']}", {"Last-Event-ID": found[0]["seq"]}
    ) as stream:
        assert await stream.next() == found[8]


async def test_what_is_not_kept_any_more_is_gone(
    serve: Serve, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "HISTORY", 4)
    monkeypatch.setattr(journal, "MOST_BEHIND", 4)
    monkeypatch.setattr(journal, "GRACE", 0)
    served = await serve(kernel)
    async with Client(served.path) as client, listening(served.path) as stream:
        found = []
        for _ in range(3):
            found += await stream.until("ended", await make_and_end(client))
        boot, _, number = found[-1]["seq"].partition("-")
        scopes = served.state.journal._scopes.values()
        await until(lambda: not any(scope.trimming for scope in scopes))
        for event in found[:1]:
            await client.refused("GET", f"/events?since={event['seq']}", status=410, kind="gone")
        for since in (f"{boot}-{int(number) + 1}", f"00000000-{number}", f"{boot}-{10**17}"):
            await client.refused("GET", f"/events?since={since}", status=410, kind="gone")
        # The oldest that is kept is the fourth from the end, so the fifth can be resumed behind.
        async with listening(served.path, f"?since={found[1]['seq']}") as other:
            assert [await other.next() for _ in range(4)] == found[2:]


@pytest.mark.parametrize(
    "since", ["x", "17", "-", "abc-", "abc-x", "abc-1.5", "abc-%C2%B2", "abc-" + "1" * 30, "1" * 65]
)
async def test_what_is_no_seq_is_refused(client: Client, since: str) -> None:
    told = await client.refused("GET", f"/events?since={since}", status=422, kind="invalid")
    assert [each["loc"] for each in told["errors"]] == [["since"]]


async def test_other_calls_rules_hold_here_too(served: Served, client: Client) -> None:
    for query in ("?what=link", "?since=a-1&since=a-2", "?limit=1"):
        await client.refused("GET", f"/events{query}", status=422, kind="invalid")
    await client.refused("POST", "/events", {}, status=405, kind="method-not-allowed")
    reader, writer = await asyncio.open_unix_connection(str(served.path))
    writer.write(b"HEAD /events HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.1 405 ")
    assert body == b""
    assert listeners(served) == 0


async def test_its_headers_come_before_any_event(served: Served) -> None:
    """Who listens knows from then on that nothing will be missed; ``listening`` waits for them."""
    async with listening(served.path) as stream:
        assert stream.status == 200
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await stream.next()


async def test_a_client_of_http_1_0(served: Served, client: Client) -> None:
    async with listening(served.path, version="1.0") as stream:
        assert "Transfer-Encoding" not in stream.headers
        lease = await make_and_end(client)
        assert len(await stream.until("ended", lease)) == 2
        await served.stop()
        assert await stream.rest() is not None


@root
async def test_users_hear_of_their_own_and_administrators_of_all(
    served: Served, client: Client, actor: Actors
) -> None:
    nobody, another = await actor(NOBODY), await actor(NOBODY - 1)
    await nobody.do("connect", 1)
    await another.do("connect", 1)
    ours, his = await nobody.give(1), await another.give(1)
    async with (
        listening(served.path) as all_,
        listening(ours) as own,
        listening(his) as none,
    ):
        await make_and_end(client)
        his_link = await a_link(nobody)
        mine = await a_link(client)
        his_other = await nobody.post("/leases", {"ttl": 60})
        last = await a_program(another)
        found = await own.until("created", his_other["id"])
        assert {each["uid"] for each in found} == {NOBODY}
        assert [each["id"] for each in found if each["what"] == "link"] == [his_link]
        # Its numbers tell nothing of what others do.
        numbers = [int(each["seq"].partition("-")[2]) for each in found]
        assert numbers == list(range(numbers[0], numbers[0] + len(found)))
        assert [each["id"] for each in await none.until("created", last)][-1] == last
        everything = await all_.until("created", last)
        assert [each["id"] for each in everything if each["what"] == "link"] == [his_link, mine]
        assert {each["uid"] for each in everything} == {os.getuid(), NOBODY, NOBODY - 1}


@root
async def test_a_users_place_is_no_place_among_others_events(
    served: Served, client: Client, actor: Actors
) -> None:
    """An administrator's seq may be too new for a user, and never shows him another's events."""
    nobody = await actor(NOBODY)
    await nobody.get("/healthz")
    async with listening(served.path) as stream:
        found = await stream.until("ended", await make_and_end(client))
    answer = await nobody.request("GET", f"/events?since={found[-1]['seq']}")
    assert (answer.status, answer.kind) == (410, "gone")


async def everything(stream: Stream) -> tuple[list[str], bool]:
    """The ids in what is left of a stream, and whether it was cut off."""
    had: list[str] = []
    try:
        while True:
            had.append((await stream.next())["id"])
    except EOFError:
        return had, False
    except Cut:
        return had, True


async def test_who_is_too_slow_is_cut_off_and_others_go_on(
    serve: Serve, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "HISTORY", 8)
    monkeypatch.setattr(journal, "MOST_BEHIND", 8)
    served = await serve(kernel)
    async with (
        Client(served.path) as client,
        listening(served.path) as slow,
        listening(served.path) as good,
    ):
        await until(lambda: listeners(served) == 2)
        for connection in served.sockets:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        ended: list[str] = []
        # It reads nothing: its socket fills up, then the server's buffer; then it falls behind.
        while listeners(served) == 2:
            made = await client.post("/leases", {"ttl": 60})
            await good.until("created", made["id"])
            await client.delete(f"/leases/{made['id']}")
            await good.until("ended", made["id"])
            ended.append(made["id"])
            assert len(ended) < 20000
        had, cut = await everything(slow)
        assert cut, "it came to its end as if nothing were missing"
        # What it had, it had without a gap: each lease twice, from the first on.
        expected = [id_ for id_ in ended for _ in range(2)]
        assert had == expected[: len(had)]
        assert len(had) < len(expected)
        last = await make_and_end(client)
        assert len(await good.until("ended", last)) == 2


async def test_who_hangs_up_leaves_nothing_behind(served: Served, client: Client) -> None:
    await client.get("/healthz")
    before = len(asyncio.all_tasks())
    for accept in (NDJSON, SSE):
        async with listening(served.path, headers={"Accept": accept}) as stream:
            await until(lambda: listeners(served) == 1)
            stream.close()
            await until(lambda: listeners(served) == 0)
    await until(lambda: served.connections == 1 and len(asyncio.all_tasks()) == before)


async def test_many_listeners_hear_the_same(served: Served, client: Client) -> None:
    streams: list[Stream] = []

    async def listen(last: asyncio.Future[str]) -> list[Any]:
        async with listening(served.path) as stream:
            streams.append(stream)
            return await stream.until("ended", await last)

    last = asyncio.get_running_loop().create_future()
    heard = [asyncio.create_task(listen(last)) for _ in range(10)]
    await until(lambda: len(streams) == 10)
    for _ in range(20):
        id_ = await make_and_end(client)
    last.set_result(id_)
    first, *others = await asyncio.gather(*heard)
    assert len(first) == 40
    assert all(each == first for each in others)


async def test_a_bug_in_the_middle_of_a_stream_cuts_it(
    served: Served, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer has begun: another one inside of it is nothing that a client could read."""

    def fail(self: object) -> list[journal.Entry]:
        raise RuntimeError("a bug")

    async with listening(served.path) as stream:
        monkeypatch.setattr(journal.Listener, "ready", fail)
        await client.post("/leases", {"ttl": 60})
        with pytest.raises(Cut):
            await stream.next()
    await until(lambda: listeners(served) == 0)


@pytest.mark.parametrize("accept", [NDJSON, SSE])
async def test_stopping_tells_the_end_and_ends_the_stream(
    served: Served, kernel: FakeKernel, accept: str
) -> None:
    async with Client(served.path) as client:
        made = await a_link(client)
        gate = kernel.hooks["close_link"] = Gate()
        async with listening(served.path, headers={"Accept": accept}) as stream:
            asked = asyncio.create_task(client.request("DELETE", f"/links/{made}"))
            await asyncio.to_thread(gate.entered.wait, 10)
            stopping = asyncio.create_task(served.stop())
            gate.open()
            assert (await asked).status == 204
            # No Cut: the body is whole, so that nobody takes it for a broken connection.
            told_ = told(await stream.rest())
            await stopping
    assert told_[0] == ("link", "detaching", "deleted")
    assert ("link", "ended", "deleted") in told_
    assert ("program", "ended", "shutdown") in told_


async def test_an_answered_stream_leaves_the_connection_usable(served: Served) -> None:
    """A refusal is an ordinary answer: the connection stays."""
    first, second = await raw(
        served.path,
        b"GET /events?since=x HTTP/1.1\r\nHost: x\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        2,
    )
    assert (first.status, second.status) == (422, 200)


async def test_a_refused_link_is_told_as_made_and_ended_or_not_at_all(
    served: Served, client: Client, kernel: FakeKernel
) -> None:
    program = await a_program(client)
    async with listening(served.path) as stream:
        await client.refused(
            "POST",
            "/links",
            link(program, symbols=["no_such"]),
            status=422,
            kind="symbol-not-found",
        )
        lease = await make_and_end(client)
        assert told(await stream.until("ended", lease), "link") == []
