// SPDX-License-Identifier: GPL-2.0-only
/* `count` for kernels before 5.15. */
#define REGISTERS
#include "count.bpf.c"
