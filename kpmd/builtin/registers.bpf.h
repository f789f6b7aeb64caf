/* SPDX-License-Identifier: GPL-2.0-only */
/* The registers that a kprobe's program is given. What includes this runs on x86-64 alone. */
#pragma once
#define __TARGET_ARCH_x86
#include <linux/bpf.h>
#include <linux/ptrace.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#define registers(ctx) ((struct pt_regs *)(ctx))
