"""The commands of docs/how-to/kubernetes.md, by kubectl and Helm's library, in a mock cluster."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import api, helm, tools
from tests.docs.pages import ROOT, blocks

PAGE = "docs/how-to/kubernetes.md"
COMMANDS = [
    command
    for each in blocks(PAGE)
    if each.reason == "cluster/test_page.py"
    for command in each.text.replace("\\\n", "").splitlines()
]


def kubectl(command: list[str], kubeconfig: Path) -> None:
    subprocess.run(
        [str(tools.kubectl()), *command[1:]],
        check=True,
        cwd=ROOT,
        env=os.environ | {"KUBECONFIG": str(kubeconfig), "HOME": str(kubeconfig.parent)},
    )


def helms(command: list[str], kubeconfig: Path) -> None:
    """The library has no command line: reads as much of it as the page uses."""
    words = iter(command)
    begin = [next(words) for _ in range(5)]
    assert begin == ["helm", "upgrade", "--install", "kpmd", "deploy/helm/kpmd"]
    values: dict[str, Any] = {}
    namespace, create = "default", False
    for word in words:
        if word == "--namespace":
            namespace = next(words)
        elif word == "--create-namespace":
            create = True
        else:
            assert word == "--set"
            name, _, value = next(words).partition("=")
            outer, _, inner = name.partition(".")
            values.setdefault(outer, {})[inner] = json.loads(value) if value == "true" else value
    helm.install_into(kubeconfig, values, "kpmd", namespace, create_namespace=create)


@pytest.fixture(scope="module", autouse=True)
def loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Before any test: what Go opens for itself it keeps, and is not for the tests to close."""
    helm.install(tmp_path_factory.mktemp("helm"))


@pytest.mark.parametrize("tool", ["kubectl apply", "helm"])
def test_commands_work(tmp_path: Path, tool: str) -> None:
    """From the top down, with one of the two ways to install."""
    chosen = [each for each in COMMANDS if "overlay" not in each or tool == "kubectl apply"]
    chosen = [each for each in chosen if not each.startswith("helm") or tool == "helm"]
    assert len(chosen) >= 4
    with api.cluster(tmp_path) as (kubeconfig, made):
        observe = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "observe"}}
        made["/api/v1/namespaces/observe"] = observe
        for each in chosen:
            words = shlex.split(each)
            {"kubectl": kubectl, "helm": helms}[words[0]](words, kubeconfig)
    for name in ("kpmd", "observe"):
        labels = made[f"/api/v1/namespaces/{name}"]["metadata"]["labels"]
        assert labels["pod-security.kubernetes.io/enforce"] == "privileged"
    (pod,) = (each for path, each in made.items() if "/pods/" in path)
    assert pod["metadata"]["namespace"] == "observe"
    daemon_set = made["/apis/apps/v1/namespaces/kpmd/daemonsets/kpmd"]
    containers = daemon_set["spec"]["template"]["spec"]["containers"]
    assert {each["name"] for each in containers} == {"kpmd", "metrics"}
    assert all(each["image"].startswith("registry.example.com/") for each in containers)
