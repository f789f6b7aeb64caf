"""What a node makes of a pod: an OCI configuration for each container, as containerd's CRI does.

Only what the objects of ``deploy`` use; a field that is not known here is an error, not left out.
"""

from __future__ import annotations

import json
import platform
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]

#: What of a pod says where and how long it runs, and nothing of what runs.
_SCHEDULING = {
    "serviceAccountName",
    "priorityClassName",
    "nodeSelector",
    "tolerations",
    "terminationGracePeriodSeconds",
}
_QUIET = {"automountServiceAccountToken": False, "enableServiceLinks": False}
_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}

#: What containerd gives a container that is not privileged (pkg/oci/spec.go, mounts.go).
_MOUNTS: list[Json] = [
    {"destination": "/proc", "type": "proc", "source": "proc",
     "options": ["nosuid", "noexec", "nodev"]},
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
     "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
    {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
     "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
    {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
     "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
    {"destination": "/sys", "type": "sysfs", "source": "sysfs",
     "options": ["nosuid", "noexec", "nodev", "ro"]},
    {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
     "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
]  # fmt: skip
_MASKED = [
    *(f"/proc/{name}" for name in ("acpi", "asound", "kcore", "keys", "latency_stats")),
    *(f"/proc/{name}" for name in ("timer_list", "timer_stats", "sched_debug", "scsi")),
    "/sys/firmware",
]
_READ_ONLY = [f"/proc/{name}" for name in ("bus", "fs", "irq", "sys", "sysrq-trigger")]


@dataclass(frozen=True)
class Node:
    """What a node has for its pods: an image, config maps by name, a seccomp profile."""

    root: Path
    image: Json
    profile: Json
    #: Where volumes that are not the node's own are made.
    volumes: Path
    config_maps: dict[str, dict[str, str]] = field(default_factory=dict)


def container(pod: Json, node: Node, name: str) -> Json:
    """The OCI configuration of a container of a pod. Raises ValueError for what is not known."""
    spec = deepcopy(pod)
    for each in _SCHEDULING:
        spec.pop(each, None)
    for each, value in _QUIET.items():
        _expect(spec, each, value)
    (one,) = (each for each in spec.pop("containers") if each["name"] == name)
    security: Json = spec.pop("securityContext") | one.pop("securityContext")
    host_pid = spec.pop("hostPID", False)
    volumes = {each.pop("name"): each for each in spec.pop("volumes", [])}
    _nothing_left(spec)

    for each in ("name", "image", "imagePullPolicy", "ports", "startupProbe", "livenessProbe"):
        one.pop(each, None)
    env = [*node.image.get("Env", []), *(_variable(each) for each in one.pop("env", []))]
    # A command takes the place of the image's own, arguments that of its arguments.
    arguments = one.pop("args", [])
    arguments = one.pop("command", None) or [*node.image.get("Entrypoint", []), *arguments]
    mounts = [_mount(each, volumes, node) for each in one.pop("volumeMounts", [])]
    memory = _bytes(one.pop("resources")["limits"]["memory"])
    _nothing_left(one)

    _expect(security, "privileged", False)
    if security.pop("runAsNonRoot", False) and security["runAsUser"] == 0:
        raise ValueError("runAsNonRoot, and runs as root")
    process: Json = {
        "args": arguments,
        "env": env,
        "cwd": "/",
        "user": {
            "uid": security.pop("runAsUser"),
            "gid": security.pop("runAsGroup"),
            "additionalGids": security.pop("supplementalGroups", []),
        },
        "noNewPrivileges": not security.pop("allowPrivilegeEscalation", True),
    }
    capabilities = security.pop("capabilities")
    if capabilities.pop("drop") != ["ALL"]:
        raise ValueError("a runtime's own capabilities are not known here")
    names = [f"CAP_{each}" for each in capabilities.pop("add", [])]
    _nothing_left(capabilities)
    # Neither inheritable nor ambient: a user who is not root keeps none over execve(2).
    process["capabilities"] = dict.fromkeys(("bounding", "effective", "permitted"), names)
    if security.pop("seccompProfile") != {"type": "RuntimeDefault"}:
        raise ValueError("another seccomp profile than the runtime's")
    root = {"path": str(node.root), "readonly": security.pop("readOnlyRootFilesystem", False)}
    _nothing_left(security)
    namespaces = ["network", "ipc", "uts", "cgroup", "mount", *([] if host_pid else ["pid"])]
    return {
        "ociVersion": "1.0.0",
        "process": process,
        "root": root,
        "hostname": "pod",
        "mounts": [*_MOUNTS, *mounts],
        "linux": {
            "namespaces": [{"type": each} for each in namespaces],
            "resources": {
                "devices": [{"allow": False, "access": "rwm"}],
                "memory": {"limit": memory, "swap": memory},
            },
            "maskedPaths": _MASKED,
            "readonlyPaths": _READ_ONLY,
            "seccomp": seccomp(node.profile, set(names)),
        },
    }


def _expect(found: Json, name: str, value: object) -> None:
    if found.pop(name, value) != value:
        raise ValueError(f"{name} is not {value}")


def _nothing_left(found: Json) -> None:
    if found:
        raise ValueError(f"not known here: {', '.join(found)}")


def _variable(each: Json) -> str:
    return f"{each['name']}={each['value']}"


def _bytes(text: str) -> int:
    return int(text[:-2]) * _UNITS[text[-2:]]


def _mount(mount: Json, volumes: dict[str, Json], node: Node) -> Json:
    volume = volumes[mount.pop("name")]
    if "configMap" in volume:
        source = _config_map(node, volume["configMap"]["name"])
    else:
        source = _host_path(volume["hostPath"])
    writable = "ro" if mount.pop("readOnly", False) else "rw"
    made = {
        "destination": mount.pop("mountPath"),
        "type": "bind",
        "source": str(source),
        "options": ["rbind", "rprivate", writable],
    }
    _nothing_left(mount)
    return made


def _host_path(volume: Json) -> Path:
    path = Path(volume["path"])
    if volume["type"] == "DirectoryOrCreate":
        path.mkdir(mode=0o755, exist_ok=True)
    elif volume["type"] != "Directory":
        raise ValueError(f"not known here: {volume['type']}")
    if not path.is_dir():
        raise ValueError(f"the node has no folder {path}")
    return path


def _config_map(node: Node, name: str) -> Path:
    """The files as the kubelet makes them: links through one that it changes in one go."""
    folder = node.volumes / name
    if not folder.exists():
        content = folder / "..content"
        content.mkdir(parents=True)
        (folder / "..data").symlink_to("..content")
        for file, text in node.config_maps[name].items():
            (content / file).write_text(text, encoding="utf-8")
            (folder / file).symlink_to(f"..data/{file}")
    return folder


def seccomp(profile: Json, capabilities: set[str]) -> Json:
    """The runtimes' profile, for a container with these capabilities on this machine."""
    this = {"x86_64": "SCMP_ARCH_X86_64"}[platform.machine()]
    (archs,) = (each for each in profile["archMap"] if each["architecture"] == this)
    rules = []
    for rule in profile["syscalls"]:
        with_, without = rule["includes"], rule["excludes"]
        if unknown := (with_.keys() | without.keys()) - {"caps", "arches", "minKernel"}:
            raise ValueError(f"not known here: {unknown}")
        if "arches" in with_ and "amd64" not in with_["arches"]:
            continue
        # All of them, and none of those.
        if set(with_.get("caps", [])) <= capabilities and capabilities.isdisjoint(
            without.get("caps", [])
        ):
            kept = {"names", "action", "args", "errnoRet"}
            rules.append({key: value for key, value in rule.items() if key in kept})
    return {
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "architectures": [archs["architecture"], *archs["subArchitectures"]],
        "syscalls": rules,
    }


def written(config: Json, bundle: Path) -> Path:
    """Write it to a bundle for a runtime, and return that folder."""
    bundle.mkdir(parents=True, exist_ok=True)
    (bundle / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return bundle
