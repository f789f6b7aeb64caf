"""Golden numbers of the kernel's ABI (include/uapi/linux/bpf.h)."""

from __future__ import annotations

import ctypes

import pytest

from kpmd.bpf import abi, loader_abi

LAYOUTS: dict[type[ctypes.Structure], tuple[int, dict[str, int]]] = {
    loader_abi.MapCreateAttr: (
        72,
        {
            "map_type": 0,
            "key_size": 4,
            "value_size": 8,
            "max_entries": 12,
            "map_flags": 16,
            "inner_map_fd": 20,
            "numa_node": 24,
            "map_name": 28,
            "map_ifindex": 44,
            "btf_fd": 48,
            "btf_key_type_id": 52,
            "btf_value_type_id": 56,
            "btf_vmlinux_value_type_id": 60,
            "map_extra": 64,
        },
    ),
    loader_abi.ProgLoadAttr: (
        112,
        {
            "prog_type": 0,
            "insn_cnt": 4,
            "insns": 8,
            "license": 16,
            "log_level": 24,
            "log_size": 28,
            "log_buf": 32,
            "kern_version": 40,
            "prog_flags": 44,
            "prog_name": 48,
            "prog_ifindex": 64,
            "expected_attach_type": 68,
            "prog_btf_fd": 72,
            "func_info_rec_size": 76,
            "func_info": 80,
            "func_info_cnt": 88,
            "line_info_rec_size": 92,
            "line_info": 96,
            "line_info_cnt": 104,
            "attach_btf_id": 108,
        },
    ),
    loader_abi.BtfLoadAttr: (
        32,
        {"btf": 0, "log_buf": 8, "btf_size": 16, "log_size": 20, "log_level": 24, "pad": 28},
    ),
    loader_abi.MapFreezeAttr: (4, {"map_fd": 0}),
    loader_abi.ProgBindMapAttr: (12, {"prog_fd": 0, "map_fd": 4, "flags": 8}),
    abi.PerfEventAttr: (
        72,
        {
            "type": 0,
            "size": 4,
            "config": 8,
            "sample_period": 16,
            "sample_type": 24,
            "read_format": 32,
            "flags": 40,
            "wakeup_events": 48,
            "bp_type": 52,
            "config1": 56,
            "config2": 64,
        },
    ),
    abi.LinkCreatePerfEventAttr: (
        24,
        {"prog_fd": 0, "target_fd": 4, "attach_type": 8, "flags": 12, "bpf_cookie": 16},
    ),
    abi.LinkInfoPerfEvent: (
        64,
        {
            "type": 0,
            "id": 4,
            "prog_id": 8,
            "pad": 12,
            "event_type": 16,
            "event_pad": 20,
            "func_name": 24,
            "name_len": 32,
            "offset": 36,
            "address": 40,
            "missed": 48,
            "cookie": 56,
        },
    ),
    abi.LinkCreateKprobeMultiAttr: (
        48,
        {
            "prog_fd": 0,
            "target_fd": 4,
            "attach_type": 8,
            "flags": 12,
            "kprobe_multi_flags": 16,
            "cnt": 20,
            "syms": 24,
            "addrs": 32,
            "cookies": 40,
        },
    ),
    abi.ProgLoadAttr: (
        72,
        {
            "prog_type": 0,
            "insn_cnt": 4,
            "insns": 8,
            "license": 16,
            "log_level": 24,
            "log_size": 28,
            "log_buf": 32,
            "kern_version": 40,
            "prog_flags": 44,
            "prog_name": 48,
            "prog_ifindex": 64,
            "expected_attach_type": 68,
        },
    ),
    abi.InfoAttr: (16, {"bpf_fd": 0, "info_len": 4, "info": 8}),
    abi.MapElemAttr: (32, {"map_fd": 0, "pad": 4, "key": 8, "value": 16, "flags": 24}),
    abi.MapBatchAttr: (
        56,
        {
            "in_batch": 0,
            "out_batch": 8,
            "keys": 16,
            "values": 24,
            "count": 32,
            "map_fd": 36,
            "elem_flags": 40,
            "flags": 48,
        },
    ),
    abi.LinkInfoKprobeMulti: (
        64,
        {
            "type": 0,
            "id": 4,
            "prog_id": 8,
            "pad": 12,
            "addrs": 16,
            "count": 24,
            "flags": 28,
            "missed": 32,
            "cookies": 40,
            "tail": 48,
        },
    ),
    abi.MapInfo: (
        80,
        {
            "type": 0,
            "id": 4,
            "key_size": 8,
            "value_size": 12,
            "max_entries": 16,
            "map_flags": 20,
            "name": 24,
            "ifindex": 40,
            "btf_vmlinux_value_type_id": 44,
            "netns_dev": 48,
            "netns_ino": 56,
            "btf_id": 64,
            "btf_key_type_id": 68,
            "btf_value_type_id": 72,
            "pad": 76,
        },
    ),
    abi.ProgInfo: (
        232,
        {
            "type": 0,
            "id": 4,
            "tag": 8,
            "jited_prog_len": 16,
            "xlated_prog_len": 20,
            "jited_prog_insns": 24,
            "xlated_prog_insns": 32,
            "load_time": 40,
            "created_by_uid": 48,
            "nr_map_ids": 52,
            "map_ids": 56,
            "name": 64,
            "ifindex": 80,
            "gpl_compatible": 84,
            "netns_dev": 88,
            "netns_ino": 96,
            "nr_jited_ksyms": 104,
            "nr_jited_func_lens": 108,
            "jited_ksyms": 112,
            "jited_func_lens": 120,
            "btf_id": 128,
            "func_info_rec_size": 132,
            "func_info": 136,
            "nr_func_info": 144,
            "nr_line_info": 148,
            "line_info": 152,
            "jited_line_info": 160,
            "nr_jited_line_info": 168,
            "line_info_rec_size": 172,
            "jited_line_info_rec_size": 176,
            "nr_prog_tags": 180,
            "prog_tags": 184,
            "run_time_ns": 192,
            "run_cnt": 200,
            "recursion_misses": 208,
            "verified_insns": 216,
            "attach_btf_obj_id": 220,
            "attach_btf_id": 224,
            "pad": 228,
        },
    ),
}


def test_every_struct_is_pinned() -> None:
    structs = {
        each
        for each in (*vars(abi).values(), *vars(loader_abi).values())
        if isinstance(each, type) and issubclass(each, ctypes.Structure)
    }
    assert structs == set(LAYOUTS)


@pytest.mark.parametrize("struct", LAYOUTS, ids=lambda struct: struct.__name__)
def test_layout(struct: type[ctypes.Structure]) -> None:
    size, offsets = LAYOUTS[struct]
    assert ctypes.sizeof(struct) == size
    assert {name: getattr(struct, name).offset for name, *_ in struct._fields_} == offsets
    # No hole that would be sent with whatever lay there: each field begins where one ends.
    ends = {0} | {
        getattr(struct, name).offset + getattr(struct, name).size for name, *_ in struct._fields_
    }
    assert set(offsets.values()) <= ends
    assert size in ends


def test_numbers() -> None:
    assert {each.name: each.value for each in abi.Cmd} == {
        "MAP_CREATE": 0,
        "MAP_LOOKUP_ELEM": 1,
        "MAP_UPDATE_ELEM": 2,
        "MAP_DELETE_ELEM": 3,
        "MAP_GET_NEXT_KEY": 4,
        "PROG_LOAD": 5,
        "OBJ_GET_INFO_BY_FD": 15,
        "BTF_LOAD": 18,
        "MAP_LOOKUP_AND_DELETE_ELEM": 21,
        "MAP_FREEZE": 22,
        "MAP_LOOKUP_BATCH": 24,
        "MAP_LOOKUP_AND_DELETE_BATCH": 25,
        "MAP_UPDATE_BATCH": 26,
        "MAP_DELETE_BATCH": 27,
        "LINK_CREATE": 28,
        "PROG_BIND_MAP": 35,
    }
    assert (abi.AttachType.KPROBE_MULTI, abi.AttachType.KPROBE_SESSION) == (42, 56)
    assert abi.ProgType.KPROBE.value == 2
    assert abi.KprobeMultiFlag.RETURN.value == 1
    assert abi.MAX_KPROBE_MULTI_CNT == 1048576
    assert (abi.OBJ_NAME_LEN, abi.KSYM_NAME_LEN) == (16, 512)
    assert abi.MAP_TYPES[27] == "ringbuf"
    assert {abi.MAP_TYPES[each] for each in abi.PERCPU_TYPES} == {
        "percpu_hash",
        "percpu_array",
        "lru_percpu_hash",
    }
    assert abi.PERCPU_TYPES | abi.BUCKET_TYPES | abi.OUTER_TYPES < abi.KEYED_TYPES
    assert {abi.MAP_TYPES[each] for each in abi.BUCKET_TYPES} == {
        "hash",
        "percpu_hash",
        "lru_hash",
        "lru_percpu_hash",
        "hash_of_maps",
    }
    assert {abi.MAP_TYPES[each] for each in abi.OUTER_TYPES} == {"array_of_maps", "hash_of_maps"}
    assert {abi.MAP_TYPES[each] for each in abi.QUEUE_TYPES} == {"queue", "stack"}
    assert (abi.MapFlag.STACK_BUILD_ID, abi.MapFlag.MMAPABLE) == (32, 1024)
    assert (abi.UpdateFlag.ANY, abi.UpdateFlag.NOEXIST, abi.UpdateFlag.EXIST) == (0, 1, 2)
