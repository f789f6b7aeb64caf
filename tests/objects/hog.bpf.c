// SPDX-License-Identifier: Apache-2.0
/* A map of 4 GiB. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1 << 20);
	__uint(key_size, 4);
	__uint(value_size, 4096);
} huge SEC(".maps");

SEC("kprobe.multi")
int hog(void *ctx)
{
	__u32 key = 0;

	return bpf_map_lookup_elem(&huge, &key) ? 0 : 0;
}

char LICENSE[] SEC("license") = "GPL";
