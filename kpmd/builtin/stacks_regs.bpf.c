// SPDX-License-Identifier: GPL-2.0-only
/* `stacks` for kernels before 5.15. */
#define REGISTERS
#include "stacks.bpf.c"
