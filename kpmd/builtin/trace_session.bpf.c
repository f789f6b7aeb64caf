// SPDX-License-Identifier: GPL-2.0-only
/* `trace` by session, for kernels from 6.10 on and before 7.0. */
#define SESSION
#include "trace.bpf.c"
