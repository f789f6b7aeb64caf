// SPDX-License-Identifier: Apache-2.0
// What the consumers of records share: what they count, and when they are done.
#pragma once

#include "common.h"

// Milliseconds in which nothing comes, once the writer is done: nothing will.
#define QUIET_MS 300

// Records between two looks at the clock.
#define EACH 256

struct found {
	// When the writer stops, by CLOCK_MONOTONIC.
	uint64_t until;
	// Records that came in time, and all; what they add up to: each has been looked at.
	uint64_t in_time, records, sum;
	// Those that kpmd tells to be missing, and those that the program wrote or could not write.
	uint64_t lost, written, dropped;
};

static inline void count(struct found *found, uint64_t word)
{
	found->sum += word;
	if (!(found->records++ % EACH) && now_ns() < found->until)
		found->in_time = found->records + EACH - 1;
}

static inline void answer_found(const struct found *found)
{
	uint64_t in_time = found->in_time < found->records ? found->in_time : found->records;

	printf("{\"in_time\": %llu, \"records\": %llu, \"sum\": %llu, \"lost\": %llu, "
	       "\"written\": %llu, \"dropped\": %llu}\n",
	       (unsigned long long)in_time, (unsigned long long)found->records,
	       (unsigned long long)found->sum, (unsigned long long)found->lost,
	       (unsigned long long)found->written, (unsigned long long)found->dropped);
}
