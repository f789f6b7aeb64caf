"""kpmd: attach BPF programs to kernel functions as a service.

The daemon owns every BPF file descriptor; clients without privileges speak JSON over HTTP to its
Unix socket. The packages are layered ``daemon → api → runtime → {core, bpf} → errors`` (the
import-linter contracts in ``pyproject.toml`` enforce it); ``client`` stands apart and talks to the
daemon like any other program.
"""

__version__ = "0.1.0"

#: The version of the HTTP contract, counted up when a client has to change.
API_VERSION = "1"
