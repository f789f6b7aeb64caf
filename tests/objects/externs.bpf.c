// SPDX-License-Identifier: Apache-2.0
/* What libbpf finds in the kernel by name: its version, and a function that it may lack, and does. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

extern int LINUX_KERNEL_VERSION __kconfig;
extern void kpmd_no_such_function(void) __ksym __weak;

int version;

SEC("kprobe.multi")
int externs(void *ctx)
{
	version = LINUX_KERNEL_VERSION;
	if (kpmd_no_such_function)
		kpmd_no_such_function();
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
