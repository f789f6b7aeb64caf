// SPDX-License-Identifier: GPL-2.0-only
/* One half of `linked`: the map, a variable, and the function that counts. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

__u64 step = 1;

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, __u64);
} calls SEC(".maps");

int count(__u32 process)
{
	__u64 none = 0, *known;

	bpf_map_update_elem(&calls, &process, &none, BPF_NOEXIST);
	known = bpf_map_lookup_elem(&calls, &process);
	if (known)
		__sync_fetch_and_add(known, step);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
