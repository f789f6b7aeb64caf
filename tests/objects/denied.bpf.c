// SPDX-License-Identifier: Apache-2.0
/* A map that takes CAP_NET_ADMIN. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct {
	__uint(type, BPF_MAP_TYPE_DEVMAP);
	__uint(max_entries, 1);
	__uint(key_size, 4);
	__uint(value_size, 4);
} devices SEC(".maps");

SEC("kprobe.multi") int denied(void *ctx) { return 0; }

char LICENSE[] SEC("license") = "GPL";
