"""The software bill of materials: cyclonedx-bom's, of what a lock file names, with its hashes.

Components, licences and the graph of dependencies come from the packages' own metadata. What the
tool cannot know is added: which files each component may be (the lock file's hashes), and kpmd's
version, which pyproject.toml leaves to the code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from kpmd import __version__
from tests.tools.locked import environment, pins

#: The newest that the tools which read it all know.
_SPECIFICATION = SchemaVersion.V1_6


def sbom(project: Path, lock: Path, variables: Mapping[str, str]) -> str:
    """The bill of the project in that folder as JSON (CycloneDX), the same each time.

    ``variables``: the environment; its SOURCE_DATE_EPOCH is the bill's time. Raises ValueError
    where it would not be valid, or where a package is not installed as it is locked.
    """
    locked = pins(lock)
    with tempfile.TemporaryDirectory(prefix="kpmd-sbom-") as folder:
        environment(Path(folder), locked)
        made = subprocess.run(
            [
                *(sys.executable, "-m", "cyclonedx_py", "environment", folder),
                *("--pyproject", project / "pyproject.toml", "--output-reproducible"),
                "--no-validate",  # that is done below, of the whole
                *("--spec-version", _SPECIFICATION.to_version()),
            ],
            capture_output=True,
            env=variables,
        )
    if made.returncode:
        raise ValueError(made.stderr.decode())
    bill = json.loads(made.stdout)
    bill["metadata"]["component"]["version"] = __version__
    for component in bill["components"]:
        component.setdefault("externalReferences", []).append(
            {
                "type": "distribution",
                "url": component["purl"],
                "hashes": [
                    {"alg": "SHA-256", "content": each}
                    for each in locked[component["name"].lower().replace("_", "-")].hashes
                ],
            }
        )
    text = json.dumps(bill, indent=2) + "\n"
    if error := JsonStrictValidator(_SPECIFICATION).validate_str(text):
        raise ValueError(f"the SBOM is not valid: {error}")
    return text


if __name__ == "__main__":
    sys.stdout.write(sbom(Path(), Path(sys.argv[1]), os.environ))
