// SPDX-License-Identifier: Apache-2.0
/* A map that asks to be pinned in the BPF file system. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} shared SEC(".maps");

SEC("kprobe.multi")
int pinned(void *ctx)
{
	__u32 key = 0;

	return bpf_map_lookup_elem(&shared, &key) ? 0 : 0;
}

char LICENSE[] SEC("license") = "GPL";
