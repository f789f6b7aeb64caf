/* SPDX-License-Identifier: GPL-2.0-only */
/* Which function it is that runs.
 *
 * REGISTERS: for kernels before 5.15, which do not tell a kprobe's program the address of its
 * function: taken from the registers. x86-64 alone, and at the entry of functions alone: at their
 * return the registers are those of the kernel's trampoline. */
#pragma once
#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>

/* Where a function begins. A pointer, so that it is told as an address, in hexadecimal. */
typedef const void *address;

#ifdef REGISTERS
#include "registers.bpf.h"
/* Behind the breakpoint's one byte, also where ftrace or a jump does the work of a breakpoint. These
 * kernels have no ENDBR, which would lie between the function's start and the probe. */
#define function_entered(ctx) (PT_REGS_IP(registers(ctx)) - 1)
#define function_returned(ctx) 0
#else
#define function_entered(ctx) bpf_get_func_ip(ctx)
#define function_returned(ctx) bpf_get_func_ip(ctx)
#endif
