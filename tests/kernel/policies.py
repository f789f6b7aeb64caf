"""Policies as files."""

from __future__ import annotations

#: A policy for tests that are about something else.
EVERYTHING = """
[limits]
programs = 100000
links = 100000
targets = 100000000
targets_per_link = 1048576
map_bytes = 10000000000
leases = 100000
streams = 100000
requests = 100000
connections = 100000
body_bytes = 100000000
object_bytes = 100000000
[[rules]]
name = "everything"
users = ["*"]
functions = { risky = true }
programs = { any = true }
helpers = { allow = ["all"], probe_read_kernel = true, probe_read_user = true, kfuncs = ["all"] }
maps = { types = ["all"] }
"""
