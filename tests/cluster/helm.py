"""Helm's own library, which installs the chart as ``helm install`` does.

It comes by ``requirements.txt``, into a folder of its own (`make test-objects`).
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from tests.cluster.api import cluster

PROJECT = Path(__file__).resolve().parents[2]
CHART = PROJECT / "deploy" / "helm" / "kpmd"
LIBRARY = PROJECT / "build" / "cluster" / "python"


def _library() -> Any:
    if str(LIBRARY) not in sys.path:
        sys.path.append(str(LIBRARY))
    return importlib.import_module("helm_sdkpy")


def install(
    folder: Path, values: dict[str, Any] | None = None, name: str = "kpmd", namespace: str = "kpmd"
) -> tuple[list[Any], str]:
    """What Helm creates in an empty cluster, and the notes that it shows.

    Raises the library's HelmError where the values are not good. ``folder`` is for its files.
    """
    with cluster(folder) as (kubeconfig, made):
        notes = install_into(kubeconfig, values or {}, name, namespace)
    return list(made.values()), notes


def install_into(
    kubeconfig: Path,
    values: dict[str, Any],
    name: str,
    namespace: str,
    *,
    create_namespace: bool = False,
) -> str:
    """Install the chart into a cluster, and return the notes. Raises the library's HelmError."""
    folder = str(kubeconfig.parent)
    os.environ["HELM_CACHE_HOME"] = os.environ["HELM_CONFIG_HOME"] = folder
    helm = _library()
    action = helm.Install(helm.Configuration(namespace=namespace, kubeconfig=str(kubeconfig)))
    done = asyncio.run(
        action.run(name, str(CHART), values, create_namespace=create_namespace, wait=False)
    )
    return str(done["info"]["notes"])


def lint() -> list[str]:
    """What ``helm lint`` finds wrong with the chart."""
    helm = _library()
    found = asyncio.run(helm.Lint(helm.Configuration()).run(str(CHART)))
    # 1 is for information: the chart has no icon.
    worse = [str(each) for each in found["Messages"] if each["Severity"] > 1]
    return [*worse, *(found["Errors"] or [])]
