// SPDX-License-Identifier: Apache-2.0
// records_write: each line on stdin is a time of CLOCK_MONOTONIC in nanoseconds; until then calls
// getpid, at which a BPF program writes records, as often as it can.
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <unistd.h>

#include "common.h"

// The clock may cost more than the call.
#define CALLS 64

int main(void)
{
	char line[64];

	while (next_round(line, sizeof(line))) {
		uint64_t until = strtoull(line, NULL, 10), calls = 0;

		while (now_ns() < until) {
			for (int each = 0; each < CALLS; each++)
				syscall(SYS_getpid);
			calls += CALLS;
		}
		printf("{\"calls\": %llu}\n", (unsigned long long)calls);
	}
	return 0;
}
