// SPDX-License-Identifier: Apache-2.0
// attach_names OBJECT NAMES: each line on stdin is a number N; attaches to the first N names.
#include "attaching.h"

int main(int argc, char **argv)
{
	LIBBPF_OPTS(bpf_kprobe_multi_opts, options);
	struct bpf_program *program;
	char line[64], **names;
	size_t count;

	if (argc != 3)
		return 2;
	names = read_lines(argv[2], &count);
	program = load(argv[1], "multi");
	options.syms = (const char **)names;
	while (next_round(line, sizeof(line))) {
		options.cnt = round_count(line, count);
		multi_round(program, NULL, &options);
	}
	return 0;
}
