// SPDX-License-Identifier: GPL-2.0-only
/* `latency` for kernels before 5.15. */
#define REGISTERS
#include "latency.bpf.c"
