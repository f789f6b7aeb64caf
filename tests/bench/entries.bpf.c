// SPDX-License-Identifier: GPL-2.0-only
/* A hash that others fill, and a program that does no more than to hold it. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 16);
	__type(key, __u64);
	__type(value, __u64);
} entries SEC(".maps");

SEC("kprobe.multi")
int hold(void *ctx)
{
	__u64 key = 0;

	return bpf_map_lookup_elem(&entries, &key) != 0;
}

char LICENSE[] SEC("license") = "GPL";
