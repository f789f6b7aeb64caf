// SPDX-License-Identifier: Apache-2.0
/* Keeps the verifier busy for long: ten programs, each near its limit of a million instructions.
 * `chatty` and `wrong` are smaller, but their logs are longer than 16 MiB; `wrong` is refused.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

static __always_inline int spin(int turns)
{
	volatile __u64 sum = 0;
	int i;

#pragma clang loop unroll(disable)
	for (i = 0; i < turns; i++)
		sum = sum + (i ^ 5);
	return 0;
}

SEC("kprobe.multi") int slow0(void *ctx) { return spin(80000); }
SEC("kprobe.multi") int slow1(void *ctx) { return spin(80000); }
SEC("kprobe.multi") int slow2(void *ctx) { return spin(80000); }
SEC("kprobe.multi") int slow3(void *ctx) { return spin(80000); }
SEC("kprobe.multi") int slow4(void *ctx) { return spin(80000); }
SEC("kprobe.multi") int slow5(void *ctx) { return spin(80000); }
SEC("kprobe.multi") int slow6(void *ctx) { return spin(80000); }
SEC("kprobe.multi") int slow7(void *ctx) { return spin(80000); }
SEC("kprobe.multi") int slow8(void *ctx) { return spin(80000); }
SEC("kprobe.multi") int slow9(void *ctx) { return spin(80000); }

SEC("?kprobe.multi") int chatty(void *ctx) { return spin(25000); }

SEC("?kprobe.multi")
int wrong(void *ctx)
{
	spin(25000);
	return *(volatile int *)0xdeadbeef;
}

char LICENSE[] SEC("license") = "GPL";
