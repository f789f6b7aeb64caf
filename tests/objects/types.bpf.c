// SPDX-License-Identifier: Apache-2.0
/* Keys, values and global variables of every type that BTF tells of. */
#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>

enum colour { RED, GREEN = 7, BLUE = -1 };
struct pair {
	__u32 left;
	__u64 right;
};
struct key {
	__u32 pid;
	char comm[16];
};
struct value {
	__s8 s8;
	__u8 u8;
	__s16 s16;
	__u16 u16;
	__s32 s32;
	__u32 u32;
	__s64 s64;
	__u64 u64;
	bool flag;
	enum colour colour;
	__u32 low : 3;
	__s32 middle : 5;
	__u32 : 8;
	enum colour tint : 4;
	__u64 high : 40;
	struct pair pair;
	union {
		__u32 word;
		__u8 bytes[4];
		struct {
			__u16 first;
			__u16 second;
		};
	};
	__u16 grid[2][3];
	char names[2][8];
	void *pointer;
};
struct event {
	__u64 time;
	__u32 pid;
	__u32 cpu;
	char comm[16];
	__u64 arguments[2];
};

const volatile __u32 limit = 3;
const volatile char label[8] = "types";
__u32 in_data = 42;
__s64 negative = -5;
struct pair in_pair = { 1, 2 };
bool in_bss;
__u64 calls;
enum colour last_colour;
struct event *event_type;

/* In a section of its own: its bytes in the object are as the compiler lays the struct out. */
const volatile struct value sample SEC(".rodata.sample") = {
	.s8 = -1, .u8 = 255, .s16 = -300, .u16 = 65535, .s32 = -70000, .u32 = 4294967295,
	.s64 = -5000000000, .u64 = 18446744073709551615ULL, .flag = true, .colour = BLUE,
	.low = 5, .middle = -3, .tint = GREEN, .high = 0xabcdef0123,
	.pair = { 1, 2 }, .word = 0x04030201, .grid = { { 1, 2, 3 }, { 4, 5, 6 } },
	.names = { "first", "eight ch" }, .pointer = 0,
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16);
	__type(key, struct key);
	__type(value, struct value);
} values SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 4);
	__type(key, __u32);
	__type(value, struct pair);
} pairs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} events SEC(".maps");

SEC("kprobe.multi")
int types(void *ctx)
{
	struct event *event;
	__u32 first = 0;
	struct pair *pair = bpf_map_lookup_elem(&pairs, &first);
	struct key key = { .pid = bpf_get_current_pid_tgid() >> 32 };

	calls++;
	in_bss = calls > limit && label[0];
	last_colour = in_bss ? GREEN : RED;
	in_pair.left += in_data;
	if (pair)
		pair->right += negative;
	bpf_get_current_comm(key.comm, sizeof(key.comm));
	bpf_map_update_elem(&values, &key, (void *)&sample, BPF_ANY);
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event)
		return 0;
	*event = (struct event){ .time = bpf_ktime_get_ns(), .pid = key.pid };
	event->cpu = bpf_get_smp_processor_id();
	__builtin_memcpy(event->comm, key.comm, sizeof(key.comm));
	bpf_ringbuf_submit(event, 0);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
