// SPDX-License-Identifier: GPL-2.0-only
/* Counts the calls of every function it is attached to: map `counts`, function address to calls; or,
 * with `by_process`, map `counts_by_process`. */
#include "filter.bpf.h"
#include "function.bpf.h"

/* Count in `counts_by_process` instead, which has to be made large enough for it (max_entries). */
const volatile bool by_process = false;

/* Calls that could not be counted, because the map is full or another call held its lock. */
__u64 dropped = 0;

/* Who calls what. `command` is the thread's name. */
struct process {
	address function;
	__u32 pid;
	__u32 uid;
	char command[COMMAND_LEN];
};

/* Preallocated: nothing is allocated inside the traced functions. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 16384);
	__type(key, address);
	__type(value, __u64);
} counts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 1);
	__type(key, struct process);
	__type(value, __u64);
} counts_by_process SEC(".maps");

static __always_inline void add(void *map, const void *key)
{
	__u64 *calls, one = 1;

	calls = bpf_map_lookup_elem(map, key);
	if (!calls) {
		if (!bpf_map_update_elem(map, key, &one, BPF_NOEXIST))
			return;
		/* Another CPU may have made the entry meanwhile. */
		calls = bpf_map_lookup_elem(map, key);
		if (!calls) {
			__sync_fetch_and_add(&dropped, 1);
			return;
		}
	}
	/* This CPU's own value; the kernel runs one such program per CPU at a time. */
	*calls += 1;
}

SEC("kprobe.multi")
int count(void *ctx)
{
	struct process process = {};

	if (!wanted())
		return 0;
	process.function = (address)function_entered(ctx);
	if (!by_process) {
		add(&counts, &process.function);
		return 0;
	}
	process.pid = bpf_get_current_pid_tgid() >> 32;
	process.uid = bpf_get_current_uid_gid();
	bpf_get_current_comm(process.command, sizeof(process.command));
	add(&counts_by_process, &process);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
