// SPDX-License-Identifier: GPL-2.0-only
/* Records what a program sees of each target: by cookie, the function's address and its calls. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

const volatile __u32 target_pid = 0;

struct seen {
	__u64 function;
	__u64 calls;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, struct seen);
} seen SEC(".maps");

static int record(void *ctx)
{
	__u64 cookie = bpf_get_attach_cookie(ctx);
	struct seen fresh = {}, *old;

	if (target_pid && bpf_get_current_pid_tgid() >> 32 != target_pid)
		return 0;
	fresh.function = bpf_get_func_ip(ctx);
	bpf_map_update_elem(&seen, &cookie, &fresh, BPF_NOEXIST);
	old = bpf_map_lookup_elem(&seen, &cookie);
	if (old)
		__sync_fetch_and_add(&old->calls, 1);
	return 0;
}

SEC("kprobe.multi")
int on_entry(void *ctx)
{
	return record(ctx);
}

SEC("kretprobe.multi")
int on_return(void *ctx)
{
	return record(ctx);
}

char LICENSE[] SEC("license") = "GPL";
