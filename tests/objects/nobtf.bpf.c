// SPDX-License-Identifier: Apache-2.0
/* build: no BTF */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

const volatile __u32 limit = 1;

SEC("kprobe.multi") int nobtf(void *ctx) { return limit ? 0 : (int)bpf_ktime_get_ns() & 0; }

char LICENSE[] SEC("license") = "GPL";
