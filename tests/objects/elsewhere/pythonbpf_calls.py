# SPDX-License-Identifier: GPL-2.0-only
# mypy: ignore-errors
# ruff: noqa
"""Calls by process, written for PythonBPF.

It compiles what is decorated, and reads this file for it: no line of it runs as Python.
"""

from ctypes import c_int64, c_uint32, c_uint64, c_void_p

from pythonbpf import bpf, bpfglobal, map, section
from pythonbpf.helper import pid
from pythonbpf.maps import HashMap


@bpf
@map
def calls() -> HashMap:
    return HashMap(key=c_uint32, value=c_uint64, max_entries=1024)


@bpf
@bpfglobal
def step() -> c_uint64:
    return c_uint64(1)


@bpf
@bpfglobal
def returns() -> c_uint64:
    return c_uint64(0)


# A section of libbpf's for many functions, and one for the one function that its name tells.
@bpf
@section("kprobe.multi")
def on_entry(ctx: c_void_p) -> c_int64:
    process = pid()
    before = calls.lookup(process)
    if before:
        calls.update(process, before + step)
    else:
        first = step
        calls.update(process, first)
    return 0


@bpf
@section("kretprobe/vfs_read")
def on_return(ctx: c_void_p) -> c_int64:
    global returns
    returns = returns + step
    return 0


@bpf
@bpfglobal
def LICENSE() -> str:
    return "GPL"
