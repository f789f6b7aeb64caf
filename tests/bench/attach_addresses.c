// SPDX-License-Identifier: Apache-2.0
// attach_addresses OBJECT ADDRESSES: each line on stdin is a number N; attaches to the first N
// addresses, which the file has in hexadecimal.
#include "attaching.h"

int main(int argc, char **argv)
{
	LIBBPF_OPTS(bpf_kprobe_multi_opts, options);
	struct bpf_program *program;
	unsigned long *addresses;
	char line[64], **lines;
	size_t count;

	if (argc != 3)
		return 2;
	lines = read_lines(argv[2], &count);
	addresses = calloc(count, sizeof(*addresses));
	if (!addresses)
		die("calloc");
	for (size_t each = 0; each < count; each++)
		addresses[each] = strtoul(lines[each], NULL, 16);
	program = load(argv[1], "multi");
	options.addrs = addresses;
	while (next_round(line, sizeof(line))) {
		options.cnt = round_count(line, count);
		multi_round(program, NULL, &options);
	}
	return 0;
}
