// SPDX-License-Identifier: GPL-2.0-only
/* How long calls take, of every function it is attached to: map `latencies`, function address to
 * histogram. SESSION: one program, linked as a session; else two, as kprobe and as kretprobe. */
#include "clock.bpf.h"
#include "filter.bpf.h"

#include "function.bpf.h"

#ifdef SESSION
#include "session.bpf.h"
#else
struct begun {
	__u64 function;
	__u64 time_ns;
};
#include "calls.bpf.h"
#endif

#define SLOTS 64

/* Calls that are not in `latencies`, because it is full or another call held its lock. */
__u64 dropped = 0;

/* `slots[i]` are the calls of 2^i to 2^(i+1)-1 ns; `slots[0]` those of 0, too. */
struct latency {
	__u64 calls;
	__u64 total_ns;
	__u64 max_ns;
	__u64 slots[SLOTS];
};

/* Each CPU has its own: the kernel runs one such program per CPU at a time, also in interrupts, so
 * that nothing is lost, and no CPU waits for another. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 1024);
	__type(key, address);
	__type(value, struct latency);
} latencies SEC(".maps");

/* What a function begins with: more than a program's stack has room for. */
static const struct latency nothing;

static __always_inline __u32 slot_of(__u64 ns)
{
	__u32 slot = 0, bits;

#pragma unroll
	for (bits = SLOTS / 2; bits; bits /= 2) {
		if (ns >> bits) {
			ns >>= bits;
			slot += bits;
		}
	}
	return slot;
}

static __always_inline void add(__u64 function, __u64 ns)
{
	struct latency *latency = bpf_map_lookup_elem(&latencies, &function);

	if (!latency) {
		/* Fails where another CPU has made the entry meanwhile. */
		bpf_map_update_elem(&latencies, &function, &nothing, BPF_NOEXIST);
		latency = bpf_map_lookup_elem(&latencies, &function);
		if (!latency) {
			__sync_fetch_and_add(&dropped, 1);
			return;
		}
	}
	latency->calls += 1;
	latency->total_ns += ns;
	if (ns > latency->max_ns)
		latency->max_ns = ns;
	latency->slots[slot_of(ns) & (SLOTS - 1)] += 1;
}

#ifdef SESSION
SEC("kprobe.session")
int latency(void *ctx)
{
	__u64 *time_ns = bpf_session_cookie(ctx);

	if (bpf_session_is_return(ctx)) {
		add(function_returned(ctx), since(*time_ns));
		return 0;
	}
	if (!wanted())
		return 1; /* Not called at its return. */
	*time_ns = bpf_ktime_get_ns();
	return 0;
}
#else
SEC("kprobe.multi")
int latency_entry(void *ctx)
{
	struct begun begun;

	if (!wanted())
		return 0;
	begun.function = function_entered(ctx);
	begun.time_ns = bpf_ktime_get_ns();
	begin(ctx, &begun);
	return 0;
}

SEC("kretprobe.multi")
int latency_return(void *ctx)
{
	struct begun begun;

	if (end(ctx, &begun))
		add(begun.function, since(begun.time_ns));
	return 0;
}
#endif

char LICENSE[] SEC("license") = "GPL";
