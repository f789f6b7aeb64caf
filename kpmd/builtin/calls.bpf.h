/* SPDX-License-Identifier: GPL-2.0-only */
/* Calls that have been entered and have not returned: map `calls`. Of each is kept a `struct begun`,
 * which the including source defines, with the member `function`.
 *
 * A call is known by where its return address lies, which no two calls that are under way share; by
 * its function too, because one that jumps to another (a tail call) hands its return address over;
 * and by its thread, so that a stack's next owner cannot meet what is left of the last one. So
 * recursion makes no difference. Two calls are taken for one only where the kernel misses the return
 * of the first, and the entry of the very next one of that function at that place. */
#pragma once
#include <linux/errno.h>
#include "filter.bpf.h"
#include "function.bpf.h"
#include "registers.bpf.h"
#ifdef SESSION
#include "session.bpf.h"
#endif

struct call {
	__u64 function;
	__u64 place;
	__u64 thread;
};

/* Preallocated. LRU: calls that never return, or whose return was missed, shall not fill it. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct call);
	__type(value, struct begun);
} calls SEC(".maps");

/* Returns whose entry is not known: of calls that were under way when this was attached, that the
 * kernel missed at their entry, or for which `calls` had no room. */
__u64 returns_without_entry = 0;
/* Entries whose return was missed, as far as it is found out: when another call takes their place. */
__u64 entries_without_return = 0;

#ifdef SESSION
/* The session's own bytes are the call's alone. Its entry and its return know the function. */
#define place_entered(ctx) ((__u64)bpf_session_cookie(ctx))
#define place_returned(ctx) ((__u64)bpf_session_cookie(ctx))
#else
/* The return has popped the address. */
#define place_entered(ctx) PT_REGS_SP(registers(ctx))
#define place_returned(ctx) (PT_REGS_SP(registers(ctx)) - sizeof(__u64))
#endif

/* Keep a call that is entered. */
static __always_inline void begin(void *ctx, const struct begun *begun)
{
	struct call call = {
		.function = function_returned(ctx),
		.place = place_entered(ctx),
		.thread = bpf_get_current_pid_tgid(),
	};
	/* int: kernels before 6.4 leave anything in the upper half. */
	int error = bpf_map_update_elem(&calls, &call, begun, BPF_NOEXIST);

	/* Another error is found out at the return. */
	if (error == -EEXIST) {
		__sync_fetch_and_add(&entries_without_return, 1);
		bpf_map_update_elem(&calls, &call, begun, BPF_ANY);
	}
}

/* Take out what is kept of a call that returns; whether there is any. Whose calls are wanted was
 * decided at the entry. */
static __always_inline bool end(void *ctx, struct begun *begun)
{
	struct call call = {
		.function = function_returned(ctx),
		.place = place_returned(ctx),
		.thread = bpf_get_current_pid_tgid(),
	};
	struct begun *found = bpf_map_lookup_elem(&calls, &call);

	if (!found) {
		if (wanted())
			__sync_fetch_and_add(&returns_without_entry, 1);
		return false;
	}
	*begun = *found;
	bpf_map_delete_elem(&calls, &call);
	return true;
}
