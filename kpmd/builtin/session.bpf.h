/* SPDX-License-Identifier: GPL-2.0-only */
/* Sessions (kernel 6.10): one program at the entry and at the return of a call, with 8 bytes in
 * between that are the call's own. A call whose entry is not seen, or gave 1, has no return.
 *
 * SESSION_CONTEXT: from 7.0 on the kernel's functions take the context. libbpf compares that, so it
 * takes an object for each. */
#pragma once
#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>

#ifdef SESSION_CONTEXT
extern bool bpf_session_is_return(void *ctx) __ksym;
extern __u64 *bpf_session_cookie(void *ctx) __ksym;
#else
extern bool bpf_session_is_return(void) __ksym;
extern __u64 *bpf_session_cookie(void) __ksym;
#define bpf_session_is_return(ctx) bpf_session_is_return()
#define bpf_session_cookie(ctx) bpf_session_cookie()
#endif
