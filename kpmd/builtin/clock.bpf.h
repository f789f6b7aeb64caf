/* SPDX-License-Identifier: GPL-2.0-only */
/* How long a call took. */
#pragma once
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

/* Never below 0: in an NMI this clock (CLOCK_MONOTONIC) may be a little behind. */
static __always_inline __u64 since(__u64 time_ns)
{
	__u64 now = bpf_ktime_get_ns();

	return now > time_ns ? now - time_ns : 0;
}
