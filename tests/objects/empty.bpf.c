// SPDX-License-Identifier: Apache-2.0
/* No program at all. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

char LICENSE[] SEC("license") = "GPL";
