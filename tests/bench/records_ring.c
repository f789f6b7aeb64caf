// SPDX-License-Identifier: Apache-2.0
// records_ring OBJECT: libbpf's own consumer of a ring buffer. A round is of two lines on stdin:
//   own PID BURST SIZE | handed SOCKET MAP    the object's buffer, or one that kpmd hands over
//   UNTIL                                     count what comes of it, see records.h
#define _GNU_SOURCE
#include <bpf/bpf.h>
#include <bpf/libbpf.h>

#include "http.h"
#include "records.h"

#define FUNCTION "__x64_sys_getpid"

// The object's variables, in the order in which its sections have them.
struct constants {
	uint32_t target_pid, burst, size;
};

struct written {
	uint64_t written, dropped;
};

struct own {
	struct bpf_object *object;
	struct bpf_link *link;
	struct written *written;
};

static int on_record(void *context, void *data, size_t size)
{
	uint64_t word = 0;

	memcpy(&word, data, size < sizeof(word) ? size : sizeof(word));
	count(context, word);
	return 0;
}

// What a section's variables are made with, and once it is loaded, they themselves.
static void *variables(struct bpf_object *object, const char *section, size_t wanted)
{
	struct bpf_map *map = bpf_object__find_map_by_name(object, section);
	size_t size = 0;
	void *found = map ? bpf_map__initial_value(map, &size) : NULL;

	if (!found || size < wanted) {
		errno = ENOENT;
		die(section);
	}
	return found;
}

// The object, loaded and attached; the file descriptor of its buffer.
static int make(struct own *own, const char *path, struct constants constants)
{
	const char *functions[] = {FUNCTION};
	LIBBPF_OPTS(bpf_kprobe_multi_opts, options, .syms = functions, .cnt = 1);
	int fd;

	own->object = bpf_object__open_file(path, NULL);
	if (!own->object)
		die(path);
	memcpy(variables(own->object, ".rodata", sizeof(constants)), &constants, sizeof(constants));
	if (bpf_object__load(own->object))
		die(path);
	own->written = variables(own->object, ".bss", sizeof(*own->written));
	own->link = bpf_program__attach_kprobe_multi_opts(
		bpf_object__find_program_by_name(own->object, "to_ring"), NULL, &options);
	fd = bpf_object__find_map_fd_by_name(own->object, "events");
	if (!own->link || fd < 0)
		die("to_ring");
	return fd;
}

// What comes out of a buffer, see records.h.
static struct found consume(int fd)
{
	struct found found = {0};
	struct ring_buffer *ring = ring_buffer__new(fd, on_record, &found, NULL);
	char line[64];

	if (!ring)
		die("ring_buffer__new");
	puts("{}");
	if (!next_round(line, sizeof(line)))
		exit(1);
	found.until = strtoull(line, NULL, 10);
	for (;;) {
		int got = ring_buffer__poll(ring, QUIET_MS);

		if (got < 0)
			die("ring_buffer__poll");
		if (!got && now_ns() > found.until)
			break;
	}
	ring_buffer__free(ring);
	return found;
}

int main(int argc, char **argv)
{
	char line[256], socket_path[128], map[64];
	struct constants constants;

	if (argc != 2)
		return 2;
	printf("{\"libbpf\": \"%u.%u\"}\n", libbpf_major_version(), libbpf_minor_version());
	while (next_round(line, sizeof(line))) {
		struct found found;

		if (sscanf(line, "own %u %u %u", &constants.target_pid, &constants.burst,
			   &constants.size) == 3) {
			struct own own = {0};

			found = consume(make(&own, argv[1], constants));
			found.written = own.written->written;
			found.dropped = own.written->dropped;
			bpf_link__destroy(own.link);
			bpf_object__close(own.object);
		} else if (sscanf(line, "handed %127s %63s", socket_path, map) == 2) {
			int fd = handed_over(socket_path, map);

			found = consume(fd);
			close(fd);
		} else {
			return 2;
		}
		answer_found(&found);
	}
	return 0;
}
