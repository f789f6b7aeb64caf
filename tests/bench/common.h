// SPDX-License-Identifier: Apache-2.0
// What the yardsticks share. Each waits for lines on stdin: a line is one round, and is answered
// with one line of JSON. So rounds of several programs can be run alternately.
#pragma once

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static inline uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static inline _Noreturn void die(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(1);
}

// The next round's argument, without its newline; NULL when there are no more.
static inline char *next_round(char *line, int size)
{
	fflush(stdout);
	if (!fgets(line, size, stdin))
		return NULL;
	line[strcspn(line, "\n")] = 0;
	return line;
}
