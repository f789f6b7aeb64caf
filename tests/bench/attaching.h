// SPDX-License-Identifier: Apache-2.0
// What the yardsticks that attach share: the object, the list of targets, and the answer.
#pragma once

#include <bpf/libbpf.h>
#include <unistd.h>

#include "common.h"

static inline struct bpf_program *load(const char *path, const char *name)
{
	struct bpf_object *object = bpf_object__open_file(path, NULL);
	struct bpf_program *each, *found = NULL;

	if (!object)
		die(path);
	bpf_object__for_each_program(each, object) {
		if (!strcmp(bpf_program__name(each), name))
			found = each;
		else
			bpf_program__set_autoload(each, false);
	}
	if (!found || bpf_object__load(object))
		die(name);
	printf("{\"libbpf\": \"%u.%u\"}\n", libbpf_major_version(), libbpf_minor_version());
	return found;
}

// The lines of a file; ends the program if there are none.
static inline char **read_lines(const char *path, size_t *count)
{
	FILE *file = fopen(path, "r");
	char **lines = NULL, *line = NULL;
	size_t size = 0, room = 0;
	ssize_t length;

	if (!file)
		die(path);
	*count = 0;
	while ((length = getline(&line, &size, file)) > 0) {
		if (line[length - 1] == '\n')
			line[length - 1] = 0;
		if (*count == room) {
			room = room ? room * 2 : 1024;
			lines = realloc(lines, room * sizeof(*lines));
			if (!lines)
				die("realloc");
		}
		lines[(*count)++] = strdup(line);
	}
	free(line);
	fclose(file);
	if (!*count) {
		errno = ENODATA;
		die(path);
	}
	return lines;
}

static inline size_t round_count(const char *line, size_t most)
{
	size_t count = strtoul(line, NULL, 10);

	if (!count || count > most) {
		errno = ERANGE;
		die(line);
	}
	return count;
}

static inline void answer(uint64_t begun, uint64_t made, uint64_t closing, uint64_t closed)
{
	printf("{\"make_ns\": %llu, \"close_ns\": %llu}\n", (unsigned long long)(made - begun),
	       (unsigned long long)(closed - closing));
}

// One kprobe-multi link, made and closed.
static inline void multi_round(const struct bpf_program *program, const char *pattern,
			       const struct bpf_kprobe_multi_opts *options)
{
	uint64_t begun = now_ns(), made, closing;
	struct bpf_link *link =
		bpf_program__attach_kprobe_multi_opts(program, pattern, options);

	if (!link)
		die("bpf_program__attach_kprobe_multi_opts");
	made = now_ns();
	closing = now_ns();
	if (bpf_link__destroy(link))
		die("bpf_link__destroy");
	answer(begun, made, closing, now_ns());
}
