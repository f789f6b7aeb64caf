"""The image with what the DaemonSet says of it, run by crun on a real kernel.

In a VM (`make test-container`). The objects are those that kubectl has made of deploy/kubernetes
beforehand: see ``objects.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import pytest

from kpmd import __version__
from tests.cluster import image, objects
from tests.cluster.containers import Container
from tests.cluster.podspec import Json, Node
from tests.kernel.rest import Rest
from tests.kernel.witness import eventually, in_kernel

SOCKET = "/run/kpmd/kpmd.sock"
DAEMON, GROUP, CLIENT = 40404, 40405, 50001
#: Of linux/capability.h.
BPF, PERFMON, SYSLOG = 39, 38, 34
CAPABILITIES = ["BPF", "PERFMON", "SYSLOG", "CHOWN", "SETUID", "SETGID"]

Start = Callable[..., Container]


@pytest.fixture(scope="session")
def node() -> Iterator[Node]:
    # crun makes a control group with limits for each container.
    wanted = "+memory +pids"
    Path("/sys/fs/cgroup/cgroup.subtree_control").write_text(wanted, encoding="ascii")
    with tempfile.TemporaryDirectory(prefix="volumes-") as volumes:
        maps = {each["metadata"]["name"]: each["data"] for each in objects.of_kind("ConfigMap")}
        yield Node(
            root=image.ROOT,
            image=json.loads(image.CONFIG.read_text(encoding="utf-8")),
            profile=json.loads(objects.PROFILE.read_text(encoding="utf-8")),
            volumes=Path(volumes),
            config_maps=maps,
        )


def the_container(pod: Json, which: str = "kpmd") -> Json:
    (found,) = (each for each in pod["containers"] if each["name"] == which)
    return cast(Json, found)


def daemon_pod(without: str | None = None, **changed: object) -> Json:
    """The DaemonSet's pod; ``without`` one of its capabilities."""
    (daemon_set,) = objects.of_kind("DaemonSet")
    pod: Json = deepcopy(daemon_set["spec"]["template"]["spec"]) | changed
    if without:
        the_container(pod)["securityContext"]["capabilities"]["add"].remove(without)
    return pod


def client_pod(*command: str, groups: tuple[int, ...] = (GROUP,)) -> Json:
    """The example of a client, with another command."""
    (example,) = objects.of_kind("Pod")
    pod: Json = deepcopy(example["spec"])
    the_container(pod, "client")["command"] = list(command)
    pod["securityContext"]["supplementalGroups"] = list(groups)
    return pod


@pytest.fixture(scope="session")
def start(node: Node) -> Iterator[Start]:
    """Starts containers; those that run still are killed in the end."""
    with ExitStack() as stack:
        number = iter(range(1000))

        def begin(pod: Json, which: str = "kpmd") -> Container:
            made = Container(f"container-{next(number)}", pod, which, node)
            stack.callback(made.close)
            return made

        yield begin


@pytest.fixture(scope="session")
def daemon(start: Start) -> Container:
    made = start(daemon_pod())
    # Its own first links, that test what the kernel can do, have come and gone by then.
    made.wait_for("symbol index built")
    return made


@pytest.fixture
def rest(daemon: Container) -> Iterator[Rest]:
    """As root of the node, who is an administrator."""
    connection = Rest(SOCKET)
    yield connection
    connection.close()


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_image_is_the_same_wherever_it_is_made(node: Node) -> None:
    """Numbers that nodes keep do not change, and no machine's own sources of packages are in it."""
    users = (image.ROOT / "etc/passwd").read_text(encoding="utf-8")
    assert f"\nkpmd-daemon:x:{DAEMON}:{DAEMON}:" in users
    groups = (image.ROOT / "etc/group").read_text(encoding="utf-8")
    assert f"\nkpmd:x:{GROUP}:" in groups
    assert list((image.ROOT / "etc/apt").rglob("*.list")) == []
    assert node.image["Labels"]["org.opencontainers.image.version"] == __version__


def test_is_not_root_and_has_three_capabilities(daemon: Container) -> None:
    found = status(daemon.pid)
    assert set(found["Uid"].split()) == set(found["Gid"].split()) == {str(DAEMON)}
    assert found["Groups"] == ""
    three = f"{1 << BPF | 1 << PERFMON | 1 << SYSLOG:016x}"
    assert found["CapPrm"] == found["CapEff"] == found["CapAmb"] == three
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")


def test_folder_is_closed_to_others(daemon: Container) -> None:
    folder, socket = os.stat("/run/kpmd"), os.stat(SOCKET)
    assert (folder.st_uid, folder.st_gid, folder.st_mode & 0o7777) == (DAEMON, GROUP, 0o2750)
    assert (socket.st_uid, socket.st_gid, socket.st_mode & 0o7777) == (DAEMON, GROUP, 0o660)


def test_probes_and_administrators_by_exec(daemon: Container) -> None:
    (probes,) = {
        tuple(the_container(daemon_pod())[kind]["exec"]["command"])
        for kind in ("startupProbe", "livenessProbe")
    }
    assert daemon.execute(*probes) == (0, "")
    answer, said = daemon.execute(
        "kpmctl", "policy", "explain", "-", "vfs_read", "--call", "metrics"
    )
    assert answer == 0, said


def test_client_counts(start: Start, daemon: Container) -> None:
    answer, said = start(
        client_pod("kpmctl", "--json", "count", "vfs_read", "--duration", "2"), "client"
    ).end()
    assert answer == 0, said
    last = json.loads(said.splitlines()[-1])
    assert int(last["functions"][0]["calls"]) > 0, last


def test_client_counts_in_its_own_control_group(start: Start, daemon: Container) -> None:
    """As docs/how-to/kubernetes.md has it: what a container sees as their root is its own."""
    script = (
        "kpmctl --json count vfs_read --cgroup /sys/fs/cgroup --by-process --duration 2 &"
        " while kill -0 $!; do cat /etc/hostname; done >/dev/null 2>&1; wait $!"
    )
    answer, said = start(client_pod("sh", "-c", script), "client").end()
    assert answer == 0, said
    last = json.loads(said.splitlines()[-1])
    assert "cat" in (found := {each["command"] for each in last["functions"]}), last
    assert found <= {"cat", "sh", "kpmctl"}, last


def test_client_without_the_group_is_refused(start: Start, daemon: Container) -> None:
    answer, said = start(client_pod("kpmctl", "links", groups=()), "client").end()
    assert answer == 4, said


def test_nothing_is_left_of_a_client_that_is_killed(
    start: Start, daemon: Container, rest: Rest
) -> None:
    eventually(lambda: rest.items("/links"), [])
    before = in_kernel()
    client = start(client_pod("kpmctl", "--json", "count", "vfs_read"), "client")
    client.wait_for("vfs_read")
    (link,) = rest.items("/links")
    assert link["owner"]["uid"] == CLIENT
    (listed,) = [each for each in rest.items("/clients") if each["uid"] == CLIENT]
    assert (listed["pid"], listed["command"]) == (client.pid, "kpmctl")
    client.kill()
    client.end()
    eventually(lambda: rest.items("/links"), [])
    eventually(in_kernel, before)


def test_another_container_shows_metrics(start: Start, daemon: Container) -> None:
    shown = start(daemon_pod(), "metrics")
    # A cluster's network plugin makes it work before anything runs.
    inside = ["nsenter", "--net", "--target", str(shown.pid)]
    subprocess.run([*inside, "ip", "link", "set", "lo", "up"], check=True)
    curl = [*inside, "curl", "--silent", "--fail", "http://127.0.0.1:9464/metrics"]
    eventually(lambda: subprocess.run(curl, check=False, capture_output=True).returncode, 0)
    said = subprocess.run(curl, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert "\nkpmd_http_requests" in said
    assert status(shown.pid)["CapBnd"] == f"{0:016x}"
    shown.kill("TERM")
    assert shown.end() == (0, "")


def test_starts_anew_in_the_same_folder_and_without_the_nodes_processes(
    start: Start, daemon: Container
) -> None:
    """Killed, it leaves its socket. Without hostPID clients have no number, from kernel 6.9 on."""
    daemon.kill()
    daemon.process.wait()
    alone = start(daemon_pod(hostPID=False))
    alone.wait_for("listening")
    connection = Rest(SOCKET)
    client = start(client_pod("kpmctl", "--json", "count", "vfs_read"), "client")
    client.wait_for("vfs_read")
    (listed,) = [each for each in connection.items("/clients") if each["uid"] == CLIENT]
    assert (listed["pid"], listed["command"]) == (0, "")
    client.kill()
    client.end()
    eventually(lambda: connection.items("/links"), [])
    connection.close()
    alone.kill("TERM")
    assert alone.end()[0] == 0
    assert os.listdir("/run/kpmd") == []


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_does_not_start_without(start: Start, capability: str) -> None:
    # As a node has it that has just been started: with the folder of an earlier container
    # CHOWN is needed no more.
    subprocess.run(["rm", "-rf", "/run/kpmd"], check=True)
    answer, said = start(daemon_pod(without=capability)).end()
    assert answer != 0
    assert "not permitted" in said


def loaded_and_attached(rest: Rest) -> tuple[str, Any]:
    """How far a count comes, and the answer there."""
    body = {"source": {"kind": "builtin", "builtin": "count"}}
    status, answer = rest("POST", "/programs", body)
    if status != 201:
        return "load", answer
    program = answer["programs"][0]["id"]
    link = {"program": program, "kind": "kprobe", "symbols": ["vfs_read"]}
    status, answer = rest("POST", "/links", link)
    if status != 201:
        return "attach", answer
    (target,) = rest.items(f"/links/{answer['id']}/targets")
    return "attached" if target["address"] else "addresses", target


@pytest.mark.parametrize(
    ("capability", "stops"), [("BPF", "load"), ("PERFMON", "load"), ("SYSLOG", "addresses")]
)
def test_daemon_does_not_work_without(start: Start, capability: str, stops: str) -> None:
    """Where kpmd-start would let it begin with one less.

    Without SYSLOG it knows no addresses: not those of functions, not what stacks are made of.
    """
    pod = daemon_pod()
    changed = f"sed s/,+{capability.lower()}//g /usr/local/bin/kpmd-start >/dev/shm/start"
    the_container(pod)["command"] = ["sh", "-c", f"{changed} && exec sh /dev/shm/start"]
    daemon = start(pod)
    daemon.wait_for("listening")
    rest = Rest(SOCKET)
    where, answer = loaded_and_attached(rest)
    rest.close()
    daemon.close()
    assert where == stops, answer
