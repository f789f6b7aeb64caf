"""What is in maps of every type, read and written through the daemon on a real kernel."""

from __future__ import annotations

import base64
import ctypes
import json
import os
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest

from kpmd.bpf import loader_abi, objects
from kpmd.bpf.abi import Cmd, MapElemAttr
from kpmd.bpf.content import MapContent
from kpmd.bpf.fd import OwnedFd
from kpmd.bpf.maps import possible_cpus
from kpmd.bpf.syscall import bpf
from kpmd.errors import NotSupported
from tests.kernel.conftest import OBJECTS, Daemon
from tests.kernel.rest import Rest, UnixConnection
from tests.kernel.test_links import GETPID, call_getpid
from tests.unit.btf import SAME_BYTES, SAMPLE

CPUS = possible_cpus()
MUCH = 1 << 20
MASK = (1 << 64) - 1


class Loaded:
    """An object, its maps and its variables, through the API."""

    def __init__(self, rest: Rest, name: str, **globals_: int) -> None:
        self.rest = rest
        elf = base64.b64encode((OBJECTS / f"{name}.bpf.o").read_bytes()).decode()
        source = {"kind": "object", "elf": elf, "globals": globals_}
        made = rest.ok("POST", "/programs", {"source": source, "attach": "kprobe_multi"})
        self.program = made["programs"][0]["id"]
        self.maps = {each["name"]: f"/maps/{each['id']}" for each in made["maps"]}

    def attach(self) -> None:
        body = {"program": self.program, "kind": "kprobe", "symbols": [GETPID]}
        self.rest.ok("POST", "/links", body)

    def page(self, name: str, query: str = "") -> Any:
        return self.rest.ok("GET", f"{self.maps[name]}/entries{query}")

    def entries(self, name: str, limit: int = 1000) -> dict[str, Any]:
        """All of a map, each key once, as the API shows it."""
        found: dict[str, Any] = {}
        after = ""
        while True:
            page = self.page(name, f"?limit={limit}{after}")
            assert len(page["items"]) <= limit
            for item in page["items"]:
                assert item["key"] not in found
                found[item["key"]] = item
            if page["next"] is None:
                return found
            after = f"&after={page['next']}"

    def put(self, name: str, items: list[dict[str, Any]], mode: str = "any") -> tuple[int, Any]:
        body = {"items": items, "mode": mode}
        return self.rest("PUT", f"{self.maps[name]}/entries", body)

    def refused(self, method: str, path: str, body: object = None) -> tuple[str, Any]:
        status, answer = self.rest(method, path, body)
        assert status >= 400, answer
        return answer["kind"], answer

    def variables(self) -> dict[str, Any]:
        page = self.rest.ok("GET", f"/programs/{self.program}/globals")
        return {each["name"]: each for each in page["items"]}

    def set(self, name: str, value: object) -> None:
        self.rest.ok("PUT", f"/programs/{self.program}/globals/{name}", {"decoded": value})


@pytest.fixture
def loaded(rest: Rest) -> Loaded:
    return Loaded(rest, "maps", target_pid=os.getpid())


def u32(number: int) -> str:
    return number.to_bytes(4, "little").hex()


def u64(number: int) -> str:
    return number.to_bytes(8, "little").hex()


def prefix(number: int) -> str:
    return (u32(32) + bytes([10, 0, 0, number]).hex()).lower()


def of_pair(number: int) -> dict[str, Any]:
    return {"left": number, "right": str(number << 40)}


#: Of each type: how its keys are written, what is put as the value of a number, and how that is
#: shown in JSON.
KEYED: dict[str, tuple[Callable[[int], str], Callable[[int], Any]]] = {
    "hash": (u64, str),
    "lru": (u64, str),
    "percpu_hash": (u32, of_pair),
    "percpu_lru": (u32, int),
    "array": (u32, of_pair),
    "percpu_array": (u32, int),
    "trie": (prefix, int),
}
PERCPU = {"percpu_hash", "percpu_lru", "percpu_array"}
ARRAYS = {"array", "percpu_array"}


@pytest.mark.parametrize("name", KEYED)
def test_each_type_from_writing_to_deleting(loaded: Loaded, name: str) -> None:
    key, value = KEYED[name]
    count = 100 if name in ARRAYS else 50
    items = [{"key": key(each), "decoded": value(each)} for each in range(count)]
    status, answer = loaded.put(name, items)
    assert (status, answer) == (200, {"written": count})

    def shown(number: int) -> Any:
        return [value(number)] * CPUS if name in PERCPU else value(number)

    for limit in (1000, 7):
        found = loaded.entries(name, limit)
        assert {each: item["decoded"]["value"] for each, item in found.items()} == {
            key(each): shown(each) for each in range(count)
        }
    one = f"{loaded.maps[name]}/entries/{key(3)}"
    copies: list[Any] = [value(each) for each in range(CPUS)]
    loaded.rest.ok("PUT", one, {"decoded": copies if name in PERCPU else value(77)})
    item = loaded.rest.ok("GET", one)
    assert item["decoded"]["value"] == (copies if name in PERCPU else value(77))
    # What was read is what can be written.
    loaded.rest.ok("PUT", one, {"value": item["value"]})
    assert loaded.rest.ok("GET", one) == item
    as_json = quote("json:" + json.dumps(item["decoded"]["key"]), safe="")
    assert loaded.rest.ok("GET", f"{loaded.maps[name]}/entries/{as_json}") == item
    if name in ARRAYS:
        for where in (one, f"{loaded.maps[name]}/entries?all=true"):
            assert loaded.refused("DELETE", where)[0] == "not-supported"
        assert loaded.refused("GET", f"{loaded.maps[name]}/entries/{key(100)}")[0] == "not-found"
        assert loaded.refused(
            "PUT", f"{loaded.maps[name]}/entries/{key(100)}", {"decoded": value(0)}
        )
        return
    loaded.rest.ok("DELETE", one)
    assert loaded.refused("DELETE", one)[0] == "not-found"
    assert loaded.refused("GET", one)[0] == "not-found"
    body = {"keys": [key(each) for each in range(5)]}
    answer = loaded.rest.ok("DELETE", f"{loaded.maps[name]}/entries", body)
    assert answer == {"deleted": 4, "missing": 1}
    answer = loaded.rest.ok("DELETE", f"{loaded.maps[name]}/entries?all=true")
    assert answer == {"deleted": count - 5, "missing": 0}
    assert loaded.page(name) == {"items": [], "next": None}


def test_buckets_that_are_larger_than_the_page(loaded: Loaded) -> None:
    """60 keys in 64 buckets: some have several."""
    items = [{"key": u32(each), "decoded": of_pair(each)} for each in range(60)]
    assert loaded.put("percpu_hash", items)[0] == 200
    for limit in (1, 2, 3):
        assert len(loaded.entries("percpu_hash", limit)) == 60


def test_dump_and_pages_have_the_same(loaded: Loaded, daemon: Daemon) -> None:
    count = 5000
    for start in range(0, count, 2500):
        items = [
            {"key": u64(each), "value": u64(~each & MASK)} for each in range(start, start + 2500)
        ]
        assert loaded.put("hash", items)[0] == 200
    expected = {u64(each): u64(~each & MASK) for each in range(count)}
    found = loaded.entries("hash", 1000)
    assert {each: item["value"] for each, item in found.items()} == expected

    def dump(accept: str) -> bytes:
        connection = UnixConnection(daemon.socket, 120)
        connection.request("GET", f"{loaded.maps['hash']}/dump", headers={"Accept": accept})
        response = connection.getresponse()
        assert response.headers["Content-Type"] == accept
        raw = response.read()
        connection.close()
        return raw

    raw = dump("application/octet-stream")
    pairs = [(raw[at : at + 8].hex(), raw[at + 8 : at + 16].hex()) for at in range(0, len(raw), 16)]
    assert len(pairs) == count
    assert dict(pairs) == expected
    lines = [json.loads(line) for line in dump("application/x-ndjson").splitlines()]
    assert {line["key"]: line["value"] for line in lines} == expected
    assert lines[0]["decoded"]["key"] == str(
        int.from_bytes(bytes.fromhex(lines[0]["key"]), "little")
    )


def test_full_maps_tell_how_many_were_written(loaded: Loaded) -> None:
    for name, most, number in (("percpu_hash", 64, "E2BIG"), ("trie", 64, "ENOSPC")):
        key, value = KEYED[name]
        items = [{"key": key(each), "decoded": value(1)} for each in range(80)]
        status, answer = loaded.put(name, items)
        assert (status, answer["kind"]) == (413, "too-large")
        # A hash keeps a spare entry or two for each CPU.
        assert most <= answer["done"] <= most + 2 * CPUS
        assert len(loaded.entries(name)) == answer["done"]
        assert answer["errno"] == number
    # An LRU makes room.
    items = [{"key": u64(each), "decoded": each} for each in range(4096)]
    assert loaded.put("lru", items)[0] == 200
    assert loaded.put("lru", [{"key": u64(5000), "decoded": 1}])[0] == 200


def test_modes(loaded: Loaded) -> None:
    path = f"{loaded.maps['hash']}/entries/{u64(1)}"
    create, replace = ({"decoded": 1, "mode": mode} for mode in ("create", "replace"))
    assert loaded.refused("PUT", path, replace)[0] == "not-found"
    loaded.rest.ok("PUT", path, create)
    loaded.rest.ok("PUT", path, replace)
    assert loaded.refused("PUT", path, create)[0] == "conflict"
    items = [{"key": u64(each), "decoded": each} for each in (5, 6, 1, 7)]
    status, answer = loaded.put("hash", items, "create")
    assert (status, answer["kind"], answer["done"]) == (409, "conflict", 2)


def test_a_trie_finds_the_longest_prefix(loaded: Loaded) -> None:
    net = {"bits": 8, "address": [10, 0, 0, 0]}
    key = quote("json:" + json.dumps(net), safe="")
    loaded.rest.ok("PUT", f"{loaded.maps['trie']}/entries/{key}", {"decoded": 9})
    assert loaded.rest.ok("GET", f"{loaded.maps['trie']}/entries/{prefix(3)}")["value"] == u32(9)
    too_long = u32(33) + "0a000001"
    kind, answer = loaded.refused(
        "PUT", f"{loaded.maps['trie']}/entries/{too_long}", {"decoded": 9}
    )
    assert kind == "invalid"
    assert "at most 32" in answer["detail"]


def test_maps_that_cannot_be_written(loaded: Loaded) -> None:
    path = f"{loaded.maps['read_only']}/entries/{u32(0)}"
    assert loaded.refused("PUT", path, {"decoded": 1})[0] == "not-supported"
    assert loaded.rest.ok("GET", path)["decoded"] == {"key": 0, "value": 0}
    path = f"{loaded.maps['.rodata']}/entries/{u32(0)}"
    kind, answer = loaded.refused("PUT", path, {"decoded": {}})
    assert kind == "not-supported"
    assert "source.globals" in answer["detail"]
    path = f"{loaded.maps['traces']}/entries/{u32(0)}"
    assert loaded.refused("PUT", path, {"value": "00" * 256})[0] == "not-supported"


def test_maps_that_cannot_be_read(loaded: Loaded) -> None:
    kind, answer = loaded.refused("GET", f"{loaded.maps['tails']}/entries")
    assert kind == "not-supported"
    assert "/fd" in answer["detail"]
    assert loaded.refused("GET", f"{loaded.maps['queue']}/entries")[0] == "not-supported"


@pytest.mark.parametrize(
    "cursor", ["b4294967295", "b999", "b0.9999999", "b1.5", "k" + "ff" * 8, "k00", "b", "x", "-1"]
)
def test_cursors_that_are_made_up(loaded: Loaded, cursor: str) -> None:
    items = [{"key": u64(each), "decoded": each} for each in range(10)]
    assert loaded.put("hash", items)[0] == 200
    status, answer = loaded.rest("GET", f"{loaded.maps['hash']}/entries?after={cursor}")
    assert status in (200, 422), answer
    status, answer = loaded.rest("GET", f"{loaded.maps['array']}/entries?after={cursor}")
    assert status == 422, answer


@pytest.mark.parametrize(("name", "order"), [("queue", [1, 2, 3, 4]), ("stack", [4, 3, 2, 1])])
def test_queues_and_stacks(loaded: Loaded, name: str, order: list[int]) -> None:
    path = loaded.maps[name]
    assert loaded.refused("POST", f"{path}/pop")[0] == "not-found"
    for number in range(1, 5):
        loaded.rest.ok("POST", f"{path}/push", {"decoded": of_pair(number)})
    kind, answer = loaded.refused("POST", f"{path}/push", {"decoded": of_pair(5)})
    assert (kind, answer["errno"]) == ("too-large", "E2BIG")
    assert loaded.rest.ok("GET", f"{path}/peek")["decoded"] == of_pair(order[0])
    taken = [loaded.rest.ok("POST", f"{path}/pop")["decoded"] for _ in order]
    assert taken == [of_pair(number) for number in order]
    assert loaded.refused("GET", f"{path}/peek")[0] == "not-found"
    for number in range(1, 7):
        body = {"decoded": of_pair(number), "overwrite": True}
        loaded.rest.ok("POST", f"{path}/push", body)
    left = [loaded.rest.ok("POST", f"{path}/pop")["decoded"]["left"] for _ in range(4)]
    assert sorted(left) == [3, 4, 5, 6]


# What programs write


@pytest.mark.kprobes
def test_stack_traces_have_names(loaded: Loaded) -> None:
    loaded.attach()
    call_getpid()
    last = loaded.entries("last_traces")
    kernel, user = (last[u32(each)]["decoded"]["value"] for each in range(2))
    assert kernel >= 0
    entry = loaded.rest.ok("GET", f"{loaded.maps['traces']}/entries/{u32(kernel)}")
    frames = entry["decoded"]["value"]["frames"]
    assert entry["decoded"]["key"] == kernel
    names = [frame["symbol"] for frame in frames]
    # What calls a system call cannot be traced itself; it is told all the same.
    assert any(name and name.startswith("do_syscall") for name in names), names
    addresses = struct.unpack("<32Q", bytes.fromhex(entry["value"]))
    assert [int(frame["address"], 16) for frame in frames] == [each for each in addresses if each]
    assert loaded.entries("traces")[u32(kernel)] == entry
    if user >= 0:
        entry = loaded.rest.ok("GET", f"{loaded.maps['user_traces']}/entries/{u32(user)}")
        frame = entry["decoded"]["value"]["frames"][0]
        assert frame["symbol"] is None
        assert (frame["address"] is None) == ("build_id" in frame)
    loaded.rest.ok("DELETE", f"{loaded.maps['traces']}/entries/{u32(kernel)}")
    assert u32(kernel) not in loaded.entries("traces")
    assert (
        loaded.rest.ok("DELETE", f"{loaded.maps['user_traces']}/entries?all=true")["missing"] == 0
    )
    assert loaded.entries("user_traces") == {}


@pytest.mark.kprobes
def test_structs_are_decoded(rest: Rest) -> None:
    loaded = Loaded(rest, "types")
    loaded.attach()
    call_getpid()
    found = [
        item["decoded"]
        for item in loaded.entries("values").values()
        if item["decoded"]["key"]["pid"] == os.getpid()
    ]
    with open("/proc/self/comm", encoding="utf-8") as file:
        assert found[0]["key"]["comm"] == file.read().rstrip("\n")
    assert found[0]["value"] == SAMPLE | SAME_BYTES
    found = loaded.entries("pairs")[u32(0)]["decoded"]["value"]
    assert len(found) == CPUS
    variables = loaded.variables()
    assert int(variables["calls"]["decoded"]) >= 1
    assert variables["label"]["decoded"] == "types"
    assert variables["in_pair"]["decoded"]["right"] == "2"
    assert variables["sample"]["decoded"]["u64"] == "18446744073709551615"
    section = loaded.page(".data")["items"][0]["decoded"]["value"]
    assert section["negative"] == "-5"


# Global variables


def test_variables_are_read_and_written(loaded: Loaded) -> None:
    found = loaded.variables()
    assert {name: each["decoded"] for name, each in found.items()} == {
        "target_pid": os.getpid(),
        "calls": "0",
        "step": 1,
        "sum": 0,
        "word": "first",
        "in_bss": False,
    }
    assert {name for name, each in found.items() if not each["writable"]} == {"target_pid"}
    loaded.set("word", "second")
    loaded.set("step", 5)
    loaded.set("in_bss", True)
    found = loaded.variables()
    shown = [found[name]["decoded"] for name in ("word", "step", "in_bss", "calls")]
    assert shown == ["second", 5, True, "0"]
    path = f"/programs/{loaded.program}/globals/target_pid"
    assert loaded.refused("PUT", path, {"decoded": 1})[0] == "not-supported"


@pytest.mark.kprobes
def test_what_a_program_counts_meanwhile_is_not_lost(loaded: Loaded) -> None:
    """``calls`` and ``in_bss`` are in one map: only the one that is meant is written."""
    loaded.attach()
    stop = threading.Event()
    made = 0

    def call() -> None:
        nonlocal made
        while not stop.is_set():
            call_getpid(10)
            made += 10

    caller = threading.Thread(target=call)
    caller.start()
    try:
        for number in range(20):
            loaded.set("in_bss", bool(number % 2))
            loaded.set("step", number)
    finally:
        stop.set()
        caller.join()
    variables = loaded.variables()
    assert int(variables["calls"]["decoded"]) >= made
    assert variables["step"]["decoded"] == 19


# Without the loader: what few objects have


@pytest.fixture
def create() -> Iterator[Callable[..., MapContent]]:
    made: list[OwnedFd] = []

    def new(**fields: int) -> MapContent:
        fd = OwnedFd(bpf(Cmd.MAP_CREATE, loader_abi.MapCreateAttr(**fields)), "a map")
        made.append(fd)
        return MapContent(fd, objects.map_info(fd), CPUS)

    yield new
    for fd in made:
        fd.close()


@pytest.mark.parametrize("type_number", [12, 13])
def test_maps_of_maps_read_as_ids(create: Callable[..., MapContent], type_number: int) -> None:
    inner = create(map_type=2, key_size=4, value_size=8, max_entries=1)
    fd = inner._fd.fileno()
    outer = create(map_type=type_number, key_size=4, value_size=4, max_entries=4, inner_map_fd=fd)
    value = ctypes.c_uint32(fd)
    for number in (1, 2):
        key = ctypes.c_uint32(number)
        attr = MapElemAttr(key=ctypes.addressof(key), value=ctypes.addressof(value))
        with outer._fd.borrow() as attr.map_fd:
            bpf(Cmd.MAP_UPDATE_ELEM, attr)
    # A client would name a file descriptor of the daemon's.
    with pytest.raises(NotSupported):
        outer.update([(bytes(4), fd.to_bytes(4, "little"))], "any")
    id_ = inner._details.kernel_id.to_bytes(4, "little")
    found: dict[bytes, bytes] = {}
    after = None
    while True:
        chunk = outer.page(after, 1, MUCH)
        if chunk.count:
            found[bytes(chunk.keys)] = bytes(chunk.values)
        after = chunk.next
        if after is None:
            break
    assert found == {bytes([number, 0, 0, 0]): id_ for number in (1, 2)}


def test_a_variable_in_a_map_that_cannot_be_mapped(create: Callable[..., MapContent]) -> None:
    made = create(map_type=2, key_size=4, value_size=16, max_entries=1)
    made.write_at(4, b"abcd")
    assert made.lookup(bytes(4)) == bytes(4) + b"abcd" + bytes(8)
    mapped = create(map_type=2, key_size=4, value_size=10_000, max_entries=1, map_flags=1 << 10)
    mapped.write_at(4094, b"abcd")
    mapped.write_at(9996, b"last")
    value = mapped.lookup(bytes(4))
    assert value is not None
    assert (value[4094:4098], value[9996:], value.count(0)) == (b"abcd", b"last", 9992)
