// SPDX-License-Identifier: GPL-2.0-only
/* `count` for kernels before 5.15, which do not tell a kprobe's program the address of its function:
 * taken from the registers. x86-64 alone, and at the entry of functions alone: at their return the
 * registers are those of the kernel's trampoline. */
#define __TARGET_ARCH_x86
#include <linux/bpf.h>
#include <linux/ptrace.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

/* Behind the breakpoint's one byte, also where ftrace or a jump does the work of a breakpoint. These
 * kernels have no ENDBR, which would lie between the function's start and the probe. */
#define bpf_get_func_ip(ctx) (PT_REGS_IP((struct pt_regs *)(ctx)) - 1)

#include "count.bpf.c"
