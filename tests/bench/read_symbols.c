// SPDX-License-Identifier: Apache-2.0
// read_symbols KALLSYMS FUNCTIONS: at each line on stdin reads both files and splits their lines
// into address, type, name and module, in memory.
#include <fcntl.h>
#include <unistd.h>

#include "common.h"

struct symbol {
	uint64_t address;
	const char *name;
	const char *module;
	char type;
};

struct table {
	char *text;
	struct symbol *symbols;
	size_t count;
};

static char *read_all(const char *path)
{
	size_t room = 1 << 20, length = 0;
	char *text = malloc(room + 1);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t got;

	if (fd < 0 || !text)
		die(path);
	while ((got = read(fd, text + length, room - length)) > 0) {
		length += (size_t)got;
		if (length == room) {
			room *= 2;
			text = realloc(text, room + 1);
			if (!text)
				die(path);
		}
	}
	if (got < 0)
		die(path);
	close(fd);
	text[length] = 0;
	return text;
}

static uint64_t hexadecimal(char **at)
{
	uint64_t value = 0;

	for (;; (*at)++) {
		unsigned int digit = (unsigned char)**at;

		if (digit >= '0' && digit <= '9')
			digit -= '0';
		else if (digit >= 'a' && digit <= 'f')
			digit -= 'a' - 10;
		else
			return value;
		value = value << 4 | digit;
	}
}

static struct table read_table(const char *path, int with_type)
{
	struct table table = {.text = read_all(path)};
	size_t room = 1 << 14;
	char *at = table.text;

	table.symbols = malloc(room * sizeof(*table.symbols));
	if (!table.symbols)
		die("malloc");
	while (*at) {
		struct symbol symbol = {.address = hexadecimal(&at)};
		char *end = at + strcspn(at, "\n");

		at++;
		if (with_type) {
			symbol.type = *at;
			at += 2;
		}
		symbol.name = at;
		at += strcspn(at, " \t\n");
		if (at < end) {
			*at = 0;
			symbol.module = at + 2;
			end[-1] = 0;
		}
		if (table.count == room) {
			room *= 2;
			table.symbols = realloc(table.symbols, room * sizeof(*table.symbols));
			if (!table.symbols)
				die("realloc");
		}
		table.symbols[table.count++] = symbol;
		at = *end ? end + 1 : end;
		*end = 0;
	}
	return table;
}

static void free_table(struct table *table)
{
	free(table->text);
	free(table->symbols);
}

int main(int argc, char **argv)
{
	char line[16];

	if (argc != 3)
		return 2;
	while (next_round(line, sizeof(line))) {
		uint64_t begun = now_ns();
		struct table kernel = read_table(argv[1], 1);
		struct table traceable = read_table(argv[2], 0);

		printf("{\"ns\": %llu, \"symbols\": %zu, \"functions\": %zu}\n",
		       (unsigned long long)(now_ns() - begun), kernel.count, traceable.count);
		free_table(&kernel);
		free_table(&traceable);
	}
	return 0;
}
