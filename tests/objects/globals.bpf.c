// SPDX-License-Identifier: Apache-2.0
/* Several programs that share a map, and global variables of every kind. */
#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>

enum colour { RED, GREEN = 7, BLUE = 0x7fffffff };
struct pair {
	__u32 left;
	__u64 right;
};
typedef const volatile __u16 wrapped;

const volatile __u8 u8 = 1;
wrapped u16 = 2;
const volatile __u32 u32 = 3;
const volatile __u64 u64 = 4;
const volatile signed char s8 = -1;
const volatile __s64 s64 = -4;
const volatile bool flag = false;
const volatile enum colour colour = RED;
const volatile char text[8] = "abc";
const volatile struct pair pair = { 5, 6 };
__u32 in_data = 42;
__s32 in_bss;
void *pointer = 0;

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8);
	__type(key, __u32);
	__type(value, __u64);
} shared SEC(".maps");

static __always_inline int work(__u32 key)
{
	__u64 sum = u8 + u16 + u32 + u64 + s8 + s64 + flag + colour + text[1] + pair.left + in_data;

	sum += (__u64)pointer + in_bss++;
	return bpf_map_update_elem(&shared, &key, &sum, 0) ? 0 : 0;
}

SEC("kprobe.multi") int entry(void *ctx) { return work(1); }
SEC("kretprobe.multi/x") int leave(void *ctx) { return work(2); }
SEC("?kprobe.multi") int optional(void *ctx) { return work(3); }
SEC("?kprobe/single") int single(void *ctx) { return work(4); }
SEC("?tracepoint/a/b") int other(void *ctx) { return work(5); }

char LICENSE[] SEC("license") = "GPL";
