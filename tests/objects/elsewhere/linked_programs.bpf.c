// SPDX-License-Identifier: GPL-2.0-only
/* The other half of `linked`: the programs, which find map, variable and function by linking. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

extern __u64 step;
extern int count(__u32 process);

__u64 returns = 0;

SEC("kprobe.multi")
int on_entry(void *ctx)
{
	return count(bpf_get_current_pid_tgid() >> 32);
}

SEC("kretprobe/vfs_read")
int on_return(void *ctx)
{
	__sync_fetch_and_add(&returns, step);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
