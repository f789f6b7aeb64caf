// SPDX-License-Identifier: Apache-2.0
// attach_glob OBJECT: each line on stdin is a pattern; attaches to what libbpf finds for it.
#include "attaching.h"

int main(int argc, char **argv)
{
	LIBBPF_OPTS(bpf_kprobe_multi_opts, options);
	struct bpf_program *program;
	char line[512];

	if (argc != 2)
		return 2;
	program = load(argv[1], "multi");
	while (next_round(line, sizeof(line)))
		multi_round(program, line, &options);
	return 0;
}
