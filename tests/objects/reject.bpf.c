// SPDX-License-Identifier: Apache-2.0
/* The verifier takes `fine` and refuses the others: `late` after a log of more than 64 KiB. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

SEC("kprobe.multi") int fine(void *ctx) { return 0; }

SEC("kprobe.multi") int wild(void *ctx) { return *(volatile int *)0xdeadbeef; }

SEC("kprobe.multi")
int late(void *ctx)
{
	volatile __u64 sum = 0;
	int i;

#pragma clang loop unroll(disable)
	for (i = 0; i < 800; i++)
		sum = sum + (i ^ 5);
	return *(volatile int *)0xdeadbeef;
}

char LICENSE[] SEC("license") = "GPL";
