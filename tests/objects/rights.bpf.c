// SPDX-License-Identifier: Apache-2.0
/* What a policy may refuse: in a program itself, below it, and reached by a tail call. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

__u64 seen;

static __noinline int below(__u64 address)
{
	__u64 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)address);
	seen = value;
	return 0;
}

SEC("kprobe.multi") int harmless(void *ctx)
{
	seen = bpf_ktime_get_ns();
	return 0;
}

SEC("?kprobe.multi") int reads(void *ctx)
{
	return bpf_probe_read_kernel(&seen, sizeof(seen), ctx) ? 0 : 0;
}

SEC("?kprobe.multi") int reads_below(void *ctx) { return below((__u64)ctx); }

SEC("?kprobe.multi") int reads_users(void *ctx)
{
	return bpf_probe_read_user(&seen, sizeof(seen), ctx) ? 0 : 0;
}

SEC("?kprobe.multi") int writes(void *ctx)
{
	bpf_probe_write_user(ctx, &seen, sizeof(seen));
	bpf_send_signal(9);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
