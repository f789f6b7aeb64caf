"""The kernel's ABI: what kpmd hands to bpf(2) and perf_event_open(2). No functions.

Layouts are those of ``include/uapi/linux/{bpf,perf_event}.h``; a golden test
(tests/unit/test_abi.py) pins the offsets. One struct per command, of the exact size that the
command's last used field needs: the kernel refuses nonzero bytes past what it knows, and older
kernels know less.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char, c_uint8, c_uint32, c_uint64
from enum import IntEnum, IntFlag


class Cmd(IntEnum):
    """Commands of bpf(2)."""

    MAP_CREATE = 0
    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    MAP_DELETE_ELEM = 3
    MAP_GET_NEXT_KEY = 4
    PROG_LOAD = 5
    OBJ_GET_INFO_BY_FD = 15
    BTF_LOAD = 18
    MAP_LOOKUP_AND_DELETE_ELEM = 21
    MAP_FREEZE = 22
    MAP_LOOKUP_BATCH = 24
    MAP_LOOKUP_AND_DELETE_BATCH = 25
    MAP_UPDATE_BATCH = 26
    MAP_DELETE_BATCH = 27
    LINK_CREATE = 28
    PROG_BIND_MAP = 35


class ProgType(IntEnum):
    """Program types kpmd loads."""

    KPROBE = 2


class AttachType(IntEnum):
    """Expected attach types of the programs that kpmd loads.

    MULTI: kernel 5.18; SESSION: kernel 6.10. NONE: for perf events, which refuse the other two on
    kernels that know them.
    """

    NONE = 0
    KPROBE_MULTI = 42
    KPROBE_SESSION = 56


class KprobeMultiFlag(IntFlag):
    """Flags of a kprobe-multi link."""

    RETURN = 1


#: The attach type of a link to a perf event (BPF_PERF_EVENT; kernel 5.15). No program is loaded
#: with it.
LINK_TO_PERF_EVENT = 41

#: The type of links to perf events (enum bpf_link_type; kernel 5.15).
LINK_TYPE_PERF_EVENT = 7

#: In a link's info: what a perf event is of (enum bpf_perf_event_type; told since kernel 6.6).
PERF_EVENT_KPROBES = frozenset({3, 4})

#: PERF_FLAG_FD_CLOEXEC of perf_event_open(2).
PERF_FLAG_FD_CLOEXEC = 8

#: The most targets that the kernel takes in one link (MAX_KPROBE_MULTI_CNT; about 6.8 and its
#: stable backports).
MAX_KPROBE_MULTI_CNT = 1 << 20

#: The most instructions that the verifier looks at (BPF_COMPLEXITY_LIMIT_INSNS), and so that a
#: program can have.
MAX_INSNS = 1_000_000

#: A program's or map's name in the kernel, its NUL included (BPF_OBJ_NAME_LEN).
OBJ_NAME_LEN = 16

#: A symbol's name in the kernel, its NUL included (KSYM_NAME_LEN since 6.1; 128 before).
KSYM_NAME_LEN = 512

#: Map types by number (enum bpf_map_type), under the names that bpftool prints.
MAP_TYPES = {
    1: "hash",
    2: "array",
    3: "prog_array",
    4: "perf_event_array",
    5: "percpu_hash",
    6: "percpu_array",
    7: "stack_trace",
    8: "cgroup_array",
    9: "lru_hash",
    10: "lru_percpu_hash",
    11: "lpm_trie",
    12: "array_of_maps",
    13: "hash_of_maps",
    14: "devmap",
    15: "sockmap",
    16: "cpumap",
    17: "xskmap",
    18: "sockhash",
    19: "cgroup_storage",
    20: "reuseport_sockarray",
    21: "percpu_cgroup_storage",
    22: "queue",
    23: "stack",
    24: "sk_storage",
    25: "devmap_hash",
    26: "struct_ops",
    27: "ringbuf",
    28: "inode_storage",
    29: "task_storage",
    30: "bloom_filter",
    31: "user_ringbuf",
    32: "cgrp_storage",
    33: "arena",
}

#: Types whose values the kernel keeps once per possible CPU.
PERCPU_TYPES = frozenset({5, 6, 10})

#: Types that can be read entry by entry, by key.
KEYED_TYPES = frozenset({1, 2, 5, 6, 7, 9, 10, 11, 12, 13})

#: Of those, hashes: the batch commands go through them bucket by bucket, else key by key.
BUCKET_TYPES = frozenset({1, 5, 9, 10, 13})

#: Of those, types whose values are other maps: written as file descriptors, read as ids.
OUTER_TYPES = frozenset({12, 13})

#: Types without keys: their values are pushed and popped.
QUEUE_TYPES = frozenset({22, 23})


class MapFlag(IntFlag):
    """Flags that a map was made with, as far as they change how it is read and written."""

    #: A stack trace's frames are struct bpf_stack_build_id.
    STACK_BUILD_ID = 1 << 5
    MMAPABLE = 1 << 10


class UpdateFlag(IntFlag):
    """Flags of BPF_MAP_UPDATE_ELEM. EXIST: in queues and stacks, what is oldest makes room."""

    ANY = 0
    NOEXIST = 1
    EXIST = 2


class ProgLoadAttr(ctypes.Structure):
    """BPF_PROG_LOAD, up to and with ``expected_attach_type`` (kernel 4.17)."""

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
    )


class LinkCreateKprobeMultiAttr(ctypes.Structure):
    """BPF_LINK_CREATE with its kprobe_multi arm (kernel 5.18)."""

    _fields_ = (
        ("prog_fd", c_uint32),
        ("target_fd", c_uint32),
        ("attach_type", c_uint32),
        ("flags", c_uint32),
        ("kprobe_multi_flags", c_uint32),
        ("cnt", c_uint32),
        ("syms", c_uint64),
        ("addrs", c_uint64),
        ("cookies", c_uint64),
    )


class PerfEventAttr(ctypes.Structure):
    """struct perf_event_attr, up to and with ``config2`` (PERF_ATTR_SIZE_VER1)."""

    _fields_ = (
        ("type", c_uint32),
        ("size", c_uint32),
        ("config", c_uint64),
        ("sample_period", c_uint64),
        ("sample_type", c_uint64),
        ("read_format", c_uint64),
        ("flags", c_uint64),
        ("wakeup_events", c_uint32),
        ("bp_type", c_uint32),
        # kprobe_func, the address of a name, or 0; and kprobe_addr, or with a name the offset.
        ("config1", c_uint64),
        ("config2", c_uint64),
    )


class LinkCreatePerfEventAttr(ctypes.Structure):
    """BPF_LINK_CREATE with its perf_event arm (kernel 5.15)."""

    _fields_ = (
        ("prog_fd", c_uint32),
        ("target_fd", c_uint32),
        ("attach_type", c_uint32),
        ("flags", c_uint32),
        ("bpf_cookie", c_uint64),
    )


class InfoAttr(ctypes.Structure):
    """BPF_OBJ_GET_INFO_BY_FD."""

    _fields_ = (
        ("bpf_fd", c_uint32),
        ("info_len", c_uint32),
        ("info", c_uint64),
    )


class MapElemAttr(ctypes.Structure):
    """The map element commands; ``value`` is ``next_key`` for BPF_MAP_GET_NEXT_KEY."""

    _fields_ = (
        ("map_fd", c_uint32),
        ("pad", c_uint32),
        ("key", c_uint64),
        ("value", c_uint64),
        ("flags", c_uint64),
    )


class MapBatchAttr(ctypes.Structure):
    """The map batch commands (kernel 5.6). The kernel writes ``count``: how many it did."""

    _fields_ = (
        ("in_batch", c_uint64),
        ("out_batch", c_uint64),
        ("keys", c_uint64),
        ("values", c_uint64),
        ("count", c_uint32),
        ("map_fd", c_uint32),
        ("elem_flags", c_uint64),
        ("flags", c_uint64),
    )


class ProgInfo(ctypes.Structure):
    """struct bpf_prog_info, up to and with ``verified_insns`` (kernel 5.16; zero before)."""

    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("tag", c_uint8 * 8),
        ("jited_prog_len", c_uint32),
        ("xlated_prog_len", c_uint32),
        ("jited_prog_insns", c_uint64),
        ("xlated_prog_insns", c_uint64),
        ("load_time", c_uint64),
        ("created_by_uid", c_uint32),
        ("nr_map_ids", c_uint32),
        ("map_ids", c_uint64),
        ("name", c_char * OBJ_NAME_LEN),
        ("ifindex", c_uint32),
        ("gpl_compatible", c_uint32),
        ("netns_dev", c_uint64),
        ("netns_ino", c_uint64),
        ("nr_jited_ksyms", c_uint32),
        ("nr_jited_func_lens", c_uint32),
        ("jited_ksyms", c_uint64),
        ("jited_func_lens", c_uint64),
        ("btf_id", c_uint32),
        ("func_info_rec_size", c_uint32),
        ("func_info", c_uint64),
        ("nr_func_info", c_uint32),
        ("nr_line_info", c_uint32),
        ("line_info", c_uint64),
        ("jited_line_info", c_uint64),
        ("nr_jited_line_info", c_uint32),
        ("line_info_rec_size", c_uint32),
        ("jited_line_info_rec_size", c_uint32),
        ("nr_prog_tags", c_uint32),
        ("prog_tags", c_uint64),
        ("run_time_ns", c_uint64),
        ("run_cnt", c_uint64),
        ("recursion_misses", c_uint64),
        ("verified_insns", c_uint32),
        ("attach_btf_obj_id", c_uint32),
        ("attach_btf_id", c_uint32),
        ("pad", c_uint32),
    )


class MapInfo(ctypes.Structure):
    """struct bpf_map_info, up to and with ``btf_value_type_id``."""

    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("key_size", c_uint32),
        ("value_size", c_uint32),
        ("max_entries", c_uint32),
        ("map_flags", c_uint32),
        ("name", c_char * OBJ_NAME_LEN),
        ("ifindex", c_uint32),
        ("btf_vmlinux_value_type_id", c_uint32),
        ("netns_dev", c_uint64),
        ("netns_ino", c_uint64),
        ("btf_id", c_uint32),
        ("btf_key_type_id", c_uint32),
        ("btf_value_type_id", c_uint32),
        ("pad", c_uint32),
    )


class LinkInfoKprobeMulti(ctypes.Structure):
    """struct bpf_link_info with its kprobe_multi arm.

    ``addrs``, ``count`` and ``flags`` since kernel 6.6, ``missed`` 6.7, ``cookies`` 6.9.
    """

    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("prog_id", c_uint32),
        ("pad", c_uint32),
        ("addrs", c_uint64),
        ("count", c_uint32),
        ("flags", c_uint32),
        ("missed", c_uint64),
        ("cookies", c_uint64),
        # The union is larger in newer kernels (64 bytes in all on 6.12); zeros: not asked for.
        ("tail", c_uint64 * 2),
    )


class LinkInfoPerfEvent(ctypes.Structure):
    """struct bpf_link_info with its perf_event arm, and in that the kprobe's.

    ``event_type``, ``offset`` and ``address`` since kernel 6.6, ``missed`` 6.7, ``cookie`` 6.9.
    """

    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("prog_id", c_uint32),
        ("pad", c_uint32),
        ("event_type", c_uint32),
        ("event_pad", c_uint32),
        ("func_name", c_uint64),
        ("name_len", c_uint32),
        ("offset", c_uint32),
        ("address", c_uint64),
        ("missed", c_uint64),
        ("cookie", c_uint64),
    )
