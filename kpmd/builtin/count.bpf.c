// SPDX-License-Identifier: GPL-2.0-only
/* Counts the calls of every function it is attached to: map `counts`, function address to calls. */
#include <linux/bpf.h>
#include <linux/errno.h>
#include <bpf/bpf_helpers.h>

/* 0: count for all processes; else for this one (its id in the initial PID namespace) alone. */
const volatile __u32 target_pid = 0;

/* Calls that could not be counted, because `counts` is full or another call held its lock. */
__u64 dropped = 0;

/* Preallocated: nothing is allocated inside the traced functions. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 16384);
	__type(key, __u64);
	__type(value, __u64);
} counts SEC(".maps");

SEC("kprobe.multi")
int count(void *ctx)
{
	__u64 function, *calls, one = 1;
	__u32 pid = target_pid;

	if (pid && bpf_get_current_pid_tgid() >> 32 != pid)
		return 0;
	function = bpf_get_func_ip(ctx);
	calls = bpf_map_lookup_elem(&counts, &function);
	if (!calls) {
		if (!bpf_map_update_elem(&counts, &function, &one, BPF_NOEXIST))
			return 0;
		/* Another CPU may have made the entry meanwhile. */
		calls = bpf_map_lookup_elem(&counts, &function);
		if (!calls) {
			__sync_fetch_and_add(&dropped, 1);
			return 0;
		}
	}
	/* This CPU's own value; the kernel runs one such program per CPU at a time. */
	*calls += 1;
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
