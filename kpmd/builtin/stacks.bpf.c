// SPDX-License-Identifier: GPL-2.0-only
/* Who calls the functions it is attached to: map `stacks`, function, stack and process to calls;
 * map `traces`, stack to the addresses in it, those of the function first. */
#include <linux/errno.h>
#include "filter.bpf.h"
#include "function.bpf.h"

#define DEPTH 64

/* False: the calls of all processes together, under pid 0. */
const volatile bool by_process = true;

/* Calls that could not be counted, because `stacks` is full or another call held its lock. */
__u64 dropped = 0;
/* Calls that are counted without their stack, because `traces` has another one in its place, */
__u64 collisions = 0;
/* has no room, */
__u64 no_room = 0;
/* or the kernel could tell none. */
__u64 no_stack = 0;

/* `stack` is a key of `traces`, or, where the stack could not be kept, below 0 (-errno): -EEXIST for
 * a collision, -ENOMEM for no room, -EFAULT for no stack. `command` is the thread's name. */
struct caller {
	address function;
	__s32 stack;
	__u32 pid;
	char command[COMMAND_LEN];
};

/* Preallocated. Not per CPU: to walk a stack takes far longer than to add atomically. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, struct caller);
	__type(value, __u64);
} stacks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_STACK_TRACE);
	__uint(max_entries, 16384);
	__type(key, __u32);
	__type(value, __u64[DEPTH]);
} traces SEC(".maps");

static __always_inline void add(const struct caller *caller)
{
	__u64 *calls, one = 1;

	calls = bpf_map_lookup_elem(&stacks, caller);
	if (!calls) {
		if (!bpf_map_update_elem(&stacks, caller, &one, BPF_NOEXIST))
			return;
		/* Another CPU may have made the entry meanwhile. */
		calls = bpf_map_lookup_elem(&stacks, caller);
		if (!calls) {
			__sync_fetch_and_add(&dropped, 1);
			return;
		}
	}
	__sync_fetch_and_add(calls, 1);
}

SEC("kprobe.multi")
int stack(void *ctx)
{
	struct caller caller = {};

	if (!wanted())
		return 0;
	caller.function = (address)function_entered(ctx);
	caller.stack = bpf_get_stackid(ctx, &traces, 0);
	if (caller.stack == -EEXIST)
		__sync_fetch_and_add(&collisions, 1);
	else if (caller.stack == -ENOMEM)
		__sync_fetch_and_add(&no_room, 1);
	else if (caller.stack < 0)
		__sync_fetch_and_add(&no_stack, 1);
	if (by_process) {
		caller.pid = bpf_get_current_pid_tgid() >> 32;
		bpf_get_current_comm(caller.command, sizeof(caller.command));
	}
	add(&caller);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
