"""The objects for Kubernetes: valid, no more privileged than they say, and the same by Helm."""

from __future__ import annotations

import re
import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from kpmd import __version__, policy_file
from kpmd.config import load
from tests.cluster import helm, objects

#: Those that are in use, and the oldest that kpmd's chart says.
VERSIONS = [f"1.{minor}" for minor in range(25, 38)]
KUSTOMIZATIONS = ["base", "client-example", "overlay-example"]
GROUP = 40405

Json = dict[str, Any]


@pytest.fixture(scope="module")
def kustomized() -> dict[str, list[Json]]:
    return {name: objects.kustomize(name) for name in KUSTOMIZATIONS}


@pytest.fixture(scope="module")
def base(kustomized: dict[str, list[Json]]) -> dict[str, Json]:
    return {each["kind"]: each for each in kustomized["base"]}


@pytest.fixture(scope="module", autouse=True)
def by_helm(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Json], str]:
    """Before any test: what Go opens for itself it keeps, and is not for the tests to close."""
    return helm.install(tmp_path_factory.mktemp("helm"))


@pytest.fixture
def installed(by_helm: tuple[list[Json], str]) -> tuple[list[Json], str]:
    return deepcopy(by_helm)


def pods(made: list[Json]) -> list[Json]:
    """The specification of each pod that the objects make."""
    return [
        each["spec"] if each["kind"] == "Pod" else each["spec"]["template"]["spec"]
        for each in made
        if each["kind"] in ("Pod", "DaemonSet")
    ]


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_kubernetes_takes_them(kustomized: dict[str, list[Json]], name: str) -> None:
    for version in VERSIONS:
        for each in kustomized[name]:
            kubernetes_validate.validate(each, version, strict=True)


def test_kubernetes_takes_what_helm_sends(installed: tuple[list[Json], str]) -> None:
    for version in VERSIONS:
        for each in installed[0]:
            kubernetes_validate.validate(each, version, strict=True)


def test_a_field_that_is_none_is_found(base: dict[str, Json]) -> None:
    wrong = base["DaemonSet"] | {"spec": base["DaemonSet"]["spec"] | {"replicas": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_daemon_has_six_capabilities_and_no_privilege(base: dict[str, Json]) -> None:
    (pod,) = pods([base["DaemonSet"]])
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "capabilities": {
            "drop": ["ALL"],
            "add": ["BPF", "PERFMON", "SYSLOG", "CHOWN", "SETUID", "SETGID"],
        },
        "privileged": False,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsUser": 0,
        "runAsGroup": 0,
    }
    assert not {"hostNetwork", "hostIPC", "initContainers"} & pod.keys()
    mounted = {each["name"]: each.get("readOnly", False) for each in container["volumeMounts"]}
    assert mounted == {"config": True, "tracefs": True, "socket": False}


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_every_pod(kustomized: dict[str, list[Json]], name: str) -> None:
    for pod in pods(kustomized[name]):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["securityContext"]["supplementalGroups"] == [GROUP]
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert container["resources"]["limits"].keys() == {"memory"}
            assert container["image"].endswith(f"kpmd:{__version__}")


def test_client_has_no_privilege(kustomized: dict[str, list[Json]]) -> None:
    (pod,) = pods(kustomized["client-example"])
    assert not {"hostPID", "hostNetwork", "hostIPC"} & pod.keys()
    assert pod["securityContext"]["runAsNonRoot"] is True
    (container,) = pod["containers"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert all(each["readOnly"] for each in container["volumeMounts"])


def test_nobody_has_rights_in_kubernetes(kustomized: dict[str, list[Json]]) -> None:
    """No kind of RBAC among them, and no token of the account that there is."""
    every = [each for made in kustomized.values() for each in made]
    kinds = {each["kind"] for each in every}
    assert kinds == {
        "Namespace",
        "ServiceAccount",
        "PriorityClass",
        "ConfigMap",
        "DaemonSet",
        "Pod",
    }
    accounts = [each for each in every if each["kind"] == "ServiceAccount"]
    assert all(each["automountServiceAccountToken"] is False for each in accounts)


def test_one_daemon_at_a_time_on_a_node(base: dict[str, Json]) -> None:
    assert base["DaemonSet"]["spec"]["updateStrategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0},
    }


@pytest.mark.parametrize("name", ["base", "overlay-example"])
def test_configuration_is_good(
    kustomized: dict[str, list[Json]], name: str, tmp_path: Path
) -> None:
    (config,) = (each for each in kustomized[name] if each["kind"] == "ConfigMap")
    assert config["data"].keys() == {"kpmd.toml", "policy.toml"}
    for file, text in config["data"].items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    settings = load(tmp_path / "kpmd.toml", policy=tmp_path / "policy.toml")
    policy = policy_file.load(settings.policy)
    assert policy.rules[-1].groups == {GROUP}


def test_what_shows_metrics_has_no_privilege(kustomized: dict[str, list[Json]]) -> None:
    """And may do nothing but that, by the policy."""
    made = {each["kind"]: each for each in kustomized["overlay-example"]}
    (pod,) = pods([made["DaemonSet"]])
    (shown,) = (each for each in pod["containers"] if each["name"] == "metrics")
    assert shown["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert shown["securityContext"]["runAsNonRoot"] is True
    assert [(each["name"], each["readOnly"]) for each in shown["volumeMounts"]] == [
        ("socket", True)
    ]
    rule = tomllib.loads(made["ConfigMap"]["data"]["policy.toml"])["rules"][0]
    assert rule["users"] == [shown["securityContext"]["runAsUser"]]
    assert rule["calls"] == ["metrics"]


def test_helm_shows_metrics_the_same_way(kustomized: dict[str, list[Json]], tmp_path: Path) -> None:
    values = {
        "metrics": {"enabled": True},
        "image": {"repository": "registry.example.com/observe/kpmd"},
    }
    sent, _ = helm.install(tmp_path, values)
    found = []
    for objects_ in (sent, kustomized["overlay-example"]):
        (template,) = (each["spec"]["template"] for each in objects_ if each["kind"] == "DaemonSet")
        containers = {each["name"]: each for each in template["spec"]["containers"]}
        found.append((template["metadata"]["annotations"], containers))
    assert found[0] == found[1]


def test_overlay_changes_what_it_says(kustomized: dict[str, list[Json]]) -> None:
    made = {each["kind"]: each for each in kustomized["overlay-example"]}
    (pod,) = pods([made["DaemonSet"]])
    assert pod["nodeSelector"]["example.com/kpmd"] == "yes"
    assert {each["image"] for each in pod["containers"]} == {
        f"registry.example.com/observe/kpmd:{__version__}"
    }
    assert made["DaemonSet"]["spec"]["updateStrategy"]["rollingUpdate"]["maxUnavailable"] == 2
    rules = tomllib.loads(made["ConfigMap"]["data"]["policy.toml"])["rules"]
    assert [each["name"] for each in rules] == ["metrics", "network", "builtins"]


def without_helms_labels(made: Json) -> Json:
    labels = made["metadata"]["labels"]
    assert labels.pop("app.kubernetes.io/managed-by") == "Helm"
    assert labels.pop("helm.sh/chart") == f"kpmd-{__version__}"
    notes = made["metadata"].pop("annotations")
    assert notes.keys() == {"meta.helm.sh/release-name", "meta.helm.sh/release-namespace"}
    return made


def test_helm_makes_the_same(
    kustomized: dict[str, list[Json]], installed: tuple[list[Json], str]
) -> None:
    """But for the namespace, which is there before ``helm install``."""
    sent = {each["kind"]: without_helms_labels(each) for each in installed[0]}
    wanted = {each["kind"]: each for each in kustomized["base"] if each["kind"] != "Namespace"}
    assert sent == wanted


def test_helm_tells_what_clients_need(installed: tuple[list[Json], str]) -> None:
    assert "/run/kpmd" in installed[1]
    assert str(GROUP) in installed[1]


def test_helm_with_other_values(tmp_path: Path) -> None:
    values = {
        "image": {"repository": "registry.example.com/kpmd", "tag": "2"},
        "imagePullSecrets": [{"name": "registry"}],
        "group": 3000000001,
        "socketFolder": "/run/observe",
        "priorityClass": {"create": False, "name": "system-node-critical"},
        "maxUnavailable": "10%",
        "nodeSelector": {"example.com/kpmd": "yes"},
        "tolerations": [],
        "podAnnotations": {"example.com/team": "kernel"},
    }
    made, _ = helm.install(tmp_path, values, name="observe", namespace="observe")
    for each in made:
        kubernetes_validate.validate(each, VERSIONS[-1], strict=True)
    by_kind = {each["kind"]: each for each in made}
    assert by_kind.keys() == {"ServiceAccount", "ConfigMap", "DaemonSet"}
    assert {each["metadata"]["name"] for each in made} == {"observe-kpmd"}
    assert {each["metadata"]["namespace"] for each in made} == {"observe"}
    policy = tomllib.loads(by_kind["ConfigMap"]["data"]["policy.toml"])
    assert policy["rules"][-1]["groups"] == [3000000001]
    (pod,) = pods(made)
    assert pod["securityContext"]["supplementalGroups"] == [3000000001]
    assert pod["priorityClassName"] == "system-node-critical"
    assert "tolerations" not in pod
    (container,) = pod["containers"]
    assert container["image"] == "registry.example.com/kpmd:2"
    assert container["env"] == [{"name": "KPMD_GROUP", "value": "3000000001"}]
    (folder,) = (each for each in pod["volumes"] if each["name"] == "socket")
    assert folder["hostPath"]["path"] == "/run/observe"
    assert (
        by_kind["DaemonSet"]["spec"]["updateStrategy"]["rollingUpdate"]["maxUnavailable"] == "10%"
    )


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ({"grup": 1}, "grup"),
        ({"group": "kpmd"}, "group"),
        ({"group": 0}, "group"),
        ({"maxUnavailable": 0}, "maxUnavailable"),
        ({"socketFolder": "run"}, "socketFolder"),
        ({"privileged": True}, "privileged"),
        ({"image": {"repository": ""}}, "repository"),
    ],
)
def test_helm_refuses(tmp_path: Path, values: Json, wrong: str) -> None:
    with pytest.raises(Exception, match=re.escape(wrong)):
        helm.install(tmp_path, values)


def test_chart_is_clean() -> None:
    assert helm.lint() == []
    chart = yaml.safe_load((helm.CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["version"] == chart["appVersion"] == __version__
