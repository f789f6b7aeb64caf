// SPDX-License-Identifier: Apache-2.0
// attach_single OBJECT NAMES: each line on stdin is a number N; attaches to the first N names one
// by one, with a perf event for each.
#include "attaching.h"

int main(int argc, char **argv)
{
	uint64_t begun, made, closing;
	struct bpf_program *program;
	struct bpf_link **links;
	char line[64], **names;
	size_t count, wanted;

	if (argc != 3)
		return 2;
	names = read_lines(argv[2], &count);
	links = calloc(count, sizeof(*links));
	if (!links)
		die("calloc");
	program = load(argv[1], "single");
	while (next_round(line, sizeof(line))) {
		wanted = round_count(line, count);
		begun = now_ns();
		for (size_t each = 0; each < wanted; each++) {
			links[each] = bpf_program__attach_kprobe(program, false, names[each]);
			if (!links[each])
				die(names[each]);
		}
		made = now_ns();
		closing = now_ns();
		for (size_t each = 0; each < wanted; each++)
			if (bpf_link__destroy(links[each]))
				die("bpf_link__destroy");
		answer(begun, made, closing, now_ns());
	}
	return 0;
}
