// SPDX-License-Identifier: Apache-2.0
// map_read SOCKET MAP: takes over a map of 8-byte keys and values, and works on it in batches:
//   fill COUNT    put so many entries into it
//   read ROOM     read all of it, so many entries at once, and add them up
#include <bpf/bpf.h>
#include <bpf/libbpf.h>

#include "http.h"

#define MOST (1 << 16)

static uint64_t keys[MOST], values[MOST];

static uint64_t fill(int map, uint32_t entries)
{
	for (uint32_t each = 0; each < entries; each++) {
		keys[each] = each;
		values[each] = (uint64_t)each << 32;
	}
	if (bpf_map_update_batch(map, keys, values, &entries, NULL))
		die("bpf_map_update_batch");
	return entries;
}

static uint64_t read_all(int map, uint32_t room, uint64_t *sum)
{
	uint64_t found = 0;
	uint32_t cursor, got;
	void *after = NULL;
	int error;

	do {
		got = room;
		error = bpf_map_lookup_batch(map, after, &cursor, keys, values, &got, NULL);
		if (error && error != -ENOENT)
			die("bpf_map_lookup_batch");
		for (uint32_t each = 0; each < got; each++)
			*sum += keys[each] + values[each];
		found += got;
		after = &cursor;
	} while (!error);
	return found;
}

int main(int argc, char **argv)
{
	char line[64];
	int map;

	if (argc != 3)
		return 2;
	map = handed_over(argv[1], argv[2]);
	printf("{\"libbpf\": \"%u.%u\"}\n", libbpf_major_version(), libbpf_minor_version());
	while (next_round(line, sizeof(line))) {
		uint64_t begun = now_ns(), entries, sum = 0;
		uint32_t number;

		if (sscanf(line, "fill %u", &number) == 1 && number <= MOST)
			entries = fill(map, number);
		else if (sscanf(line, "read %u", &number) == 1 && number <= MOST)
			entries = read_all(map, number, &sum);
		else
			return 2;
		printf("{\"ns\": %llu, \"records\": %llu, \"sum\": %llu}\n",
		       (unsigned long long)(now_ns() - begun), (unsigned long long)entries,
		       (unsigned long long)sum);
	}
	return 0;
}
