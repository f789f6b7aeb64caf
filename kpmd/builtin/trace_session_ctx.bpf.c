// SPDX-License-Identifier: GPL-2.0-only
/* `trace` by session, for kernels from 7.0 on. */
#define SESSION
#define SESSION_CONTEXT
#include "trace.bpf.c"
