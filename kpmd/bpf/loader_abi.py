"""The commands of bpf(2) that libbpf makes to load an object, as the broker reads and makes them.

Layouts are those of ``include/uapi/linux/bpf.h``; a golden test pins the offsets. No functions.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char, c_uint32, c_uint64

from kpmd.bpf.abi import OBJ_NAME_LEN


class MapCreateAttr(ctypes.Structure):
    """BPF_MAP_CREATE, up to and with ``map_extra`` (kernel 5.16)."""

    _fields_ = (
        ("map_type", c_uint32),
        ("key_size", c_uint32),
        ("value_size", c_uint32),
        ("max_entries", c_uint32),
        ("map_flags", c_uint32),
        ("inner_map_fd", c_uint32),
        ("numa_node", c_uint32),
        ("map_name", c_char * OBJ_NAME_LEN),
        ("map_ifindex", c_uint32),
        ("btf_fd", c_uint32),
        ("btf_key_type_id", c_uint32),
        ("btf_value_type_id", c_uint32),
        ("btf_vmlinux_value_type_id", c_uint32),
        ("map_extra", c_uint64),
    )


class ProgLoadAttr(ctypes.Structure):
    """BPF_PROG_LOAD with BTF, up to and with ``attach_btf_id`` (kernel 5.5)."""

    _fields_ = (
        ("prog_type", c_uint32),
        ("insn_cnt", c_uint32),
        ("insns", c_uint64),
        ("license", c_uint64),
        ("log_level", c_uint32),
        ("log_size", c_uint32),
        ("log_buf", c_uint64),
        ("kern_version", c_uint32),
        ("prog_flags", c_uint32),
        ("prog_name", c_char * OBJ_NAME_LEN),
        ("prog_ifindex", c_uint32),
        ("expected_attach_type", c_uint32),
        ("prog_btf_fd", c_uint32),
        ("func_info_rec_size", c_uint32),
        ("func_info", c_uint64),
        ("func_info_cnt", c_uint32),
        ("line_info_rec_size", c_uint32),
        ("line_info", c_uint64),
        ("line_info_cnt", c_uint32),
        ("attach_btf_id", c_uint32),
    )


class BtfLoadAttr(ctypes.Structure):
    """BPF_BTF_LOAD, up to and with ``log_level``."""

    _fields_ = (
        ("btf", c_uint64),
        ("log_buf", c_uint64),
        ("btf_size", c_uint32),
        ("log_size", c_uint32),
        ("log_level", c_uint32),
        ("pad", c_uint32),
    )


class MapFreezeAttr(ctypes.Structure):
    """BPF_MAP_FREEZE."""

    _fields_ = (("map_fd", c_uint32),)


class ProgBindMapAttr(ctypes.Structure):
    """BPF_PROG_BIND_MAP (kernel 5.10)."""

    _fields_ = (("prog_fd", c_uint32), ("map_fd", c_uint32), ("flags", c_uint32))
