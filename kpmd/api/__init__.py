"""HTTP: the contract of ``openapi.yaml`` on a Unix socket.

May import: ``kpmd.runtime`` and below. The only package that imports aiohttp.
"""
