// SPDX-License-Identifier: Apache-2.0
/* CO-RE: a field of a kernel structure, found through the kernel's BTF; and a type that is nowhere. */
#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

struct task_struct {
	int tgid;
} __attribute__((preserve_access_index));
struct kpmd_no_such_type {
	int field;
} __attribute__((preserve_access_index));

int found;

SEC("kprobe.multi")
int core(void *ctx)
{
	struct task_struct *task = (void *)bpf_get_current_task();

	found = BPF_CORE_READ(task, tgid);
	if (bpf_core_type_exists(struct kpmd_no_such_type))
		found = -1;
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
