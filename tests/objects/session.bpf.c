// SPDX-License-Identifier: Apache-2.0
/* A section that libbpf before 1.5 does not know. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

SEC("kprobe.session") int session(void *ctx) { return 0; }

char LICENSE[] SEC("license") = "GPL";
