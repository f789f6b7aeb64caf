// SPDX-License-Identifier: GPL-2.0-only
/* Writes records into a ring buffer and into perf buffers, as many and as large as it is told. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#define MOST 256

const volatile __u32 target_pid = 0;
/* Records for each call, and bytes of each record. */
const volatile __u32 burst = 1;
const volatile __u32 size = 48;

__u64 written = 0;
__u64 dropped = 0;

enum phase { BEGIN, MIDDLE, END };

struct event {
	__u64 number;
	__u64 function;
	__u32 pid;
	enum phase phase;
	char command[16];
	__s64 below_zero;
};

/* So that the struct is in the BTF, where nothing else needs it. */
struct event *unused_event __attribute__((unused));

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 18);
} events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} perf_events SEC(".maps");

union record {
	struct event event;
	char bytes[MOST];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, union record);
} scratch SEC(".maps");

static __always_inline union record *fill(void *ctx)
{
	union record *record;
	__u32 zero = 0;

	if (target_pid && bpf_get_current_pid_tgid() >> 32 != target_pid)
		return 0;
	record = bpf_map_lookup_elem(&scratch, &zero);
	if (!record)
		return 0;
	record->event.function = (__u64)ctx;
	record->event.pid = bpf_get_current_pid_tgid() >> 32;
	record->event.phase = END;
	bpf_get_current_comm(record->event.command, sizeof(record->event.command));
	record->event.below_zero = -1;
	return record;
}

SEC("kprobe.multi")
int to_ring(void *ctx)
{
	union record *record = fill(ctx);
	__u32 length = size;

	if (!record || length > MOST)
		return 0;
	for (int i = 0; i < 1024 && i < burst; i++) {
		record->event.number = written++;
		if (bpf_ringbuf_output(&events, record, length, 0))
			dropped++;
	}
	return 0;
}

SEC("?kprobe.multi")
int to_perf(void *ctx)
{
	union record *record = fill(ctx);
	__u32 length = size;

	if (!record || length > MOST)
		return 0;
	record->event.number = written++;
	if (bpf_perf_event_output(ctx, &perf_events, BPF_F_CURRENT_CPU, record, length))
		dropped++;
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
