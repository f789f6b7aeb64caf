// SPDX-License-Identifier: GPL-2.0-only
/* Maps that are handed over to their owner: a record for each call, counts, and globals. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

const volatile __u32 target_pid = 0;
__u64 calls = 0;

struct record {
	__u64 number;
	__u32 pid;
	__u32 tid;
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 16);
} records SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 64);
	__type(key, __u32);
	__type(value, __u64);
} counts SEC(".maps");

/* This one is not: it holds programs. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 4);
	__type(key, __u32);
	__type(value, __u32);
} tails SEC(".maps");

SEC("kprobe.multi")
int on_call(void *ctx)
{
	__u64 id = bpf_get_current_pid_tgid(), one = 1, *count;
	__u32 pid = id >> 32;
	struct record *made;

	if (target_pid && pid != target_pid)
		return 0;
	count = bpf_map_lookup_elem(&counts, &pid);
	if (count)
		__sync_fetch_and_add(count, 1);
	else
		bpf_map_update_elem(&counts, &pid, &one, BPF_ANY);
	made = bpf_ringbuf_reserve(&records, sizeof(*made), 0);
	if (!made)
		return 0;
	made->number = calls;
	__sync_fetch_and_add(&calls, 1);
	made->pid = pid;
	made->tid = id;
	bpf_ringbuf_submit(made, 0);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
