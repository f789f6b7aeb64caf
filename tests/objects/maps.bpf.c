// SPDX-License-Identifier: GPL-2.0-only
/* A map of each type that can be read, and a program that writes to those that only one can. */
#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>

const volatile __u32 target_pid = 0;

/* Written by the program all the time: whoever else writes may touch nothing but its own variable. */
__u64 calls = 0;
__u32 step = 1;
__u32 sum = 0;
char word[8] = "first";
bool in_bss;

struct pair {
	__u32 left;
	__u64 right;
};
struct prefix {
	__u32 bits;
	__u8 address[4];
};

#define MAP(name_, type_, key_, value_, entries_, flags_)                                          \
	struct {                                                                                   \
		__uint(type, BPF_MAP_TYPE_##type_);                                                \
		__uint(max_entries, entries_);                                                     \
		__uint(map_flags, flags_);                                                         \
		__type(key, key_);                                                                 \
		__type(value, value_);                                                             \
	} name_ SEC(".maps")

#define LINE(name_, type_, value_, entries_)                                                       \
	struct {                                                                                   \
		__uint(type, BPF_MAP_TYPE_##type_);                                                \
		__uint(max_entries, entries_);                                                     \
		__type(value, value_);                                                             \
	} name_ SEC(".maps")

MAP(hash, HASH, __u64, __u64, 8192, 0);
MAP(lru, LRU_HASH, __u64, __u64, 4096, 0);
MAP(percpu_hash, PERCPU_HASH, __u32, struct pair, 64, 0);
MAP(percpu_lru, LRU_PERCPU_HASH, __u32, __u32, 1024, 0);
MAP(array, ARRAY, __u32, struct pair, 100, 0);
MAP(percpu_array, PERCPU_ARRAY, __u32, __u32, 100, 0);
MAP(trie, LPM_TRIE, struct prefix, __u32, 64, BPF_F_NO_PREALLOC);
MAP(read_only, ARRAY, __u32, __u32, 4, BPF_F_RDONLY);
MAP(traces, STACK_TRACE, __u32, __u64[32], 1024, 0);
MAP(user_traces, STACK_TRACE, __u32, struct bpf_stack_build_id[32], 1024, BPF_F_STACK_BUILD_ID);
MAP(last_traces, ARRAY, __u32, __s32, 2, 0);
MAP(tails, PROG_ARRAY, __u32, __u32, 2, 0);
LINE(queue, QUEUE, struct pair, 4);
LINE(stack, STACK, struct pair, 4);

SEC("kprobe.multi")
int record(void *ctx)
{
	__u32 kernel = 0, user = 1;
	struct pair pair = { 0, 0 };
	__s32 id;

	if (target_pid && bpf_get_current_pid_tgid() >> 32 != target_pid)
		return 0;
	calls++;
	sum += step;
	in_bss = word[0] == 'f';
	id = bpf_get_stackid(ctx, &traces, 0);
	bpf_map_update_elem(&last_traces, &kernel, &id, 0);
	id = bpf_get_stackid(ctx, &user_traces, BPF_F_USER_STACK);
	bpf_map_update_elem(&last_traces, &user, &id, 0);
	pair.left = calls;
	pair.right = bpf_get_current_pid_tgid() >> 32;
	bpf_map_push_elem(&queue, &pair, 0);
	bpf_map_push_elem(&stack, &pair, 0);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
