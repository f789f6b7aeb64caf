"""asyncio over ``core`` and ``bpf``: the services that the API calls.

May import: ``kpmd.core``, ``kpmd.bpf``, ``kpmd.errors``. Knows nothing of HTTP.
"""
