"""What is in a loaded object's map, without a daemon."""

from __future__ import annotations

from kpmd.bpf.kernel import LinuxKernel, LoadedMap


def entries(kernel: LinuxKernel, found: LoadedMap) -> dict[bytes, list[bytes]]:
    """Keys, and for each its value, or those of all CPUs."""
    content = kernel.content(found.fd, found.details)
    made: dict[bytes, list[bytes]] = {}
    after = None
    while True:
        chunk = content.page(after, 4096, 1 << 20)
        key, value = content.layout.key_size, content.layout.values
        for each in range(chunk.count):
            raw = bytes(chunk.values[each * value : (each + 1) * value])
            made[bytes(chunk.keys[each * key : (each + 1) * key])] = content.layout.split(raw)
        after = chunk.next
        if after is None:
            return made
