// SPDX-License-Identifier: GPL-2.0-only
/* `trace` for kernels before 5.15. */
#define REGISTERS
#include "trace.bpf.c"
