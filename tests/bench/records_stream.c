// SPDX-License-Identifier: Apache-2.0
// records_stream SOCKET: reads what kpmd streams, over a new connection for each round:
//   all KIND PATH       up to its end: how many bytes and in how much time
//   follow KIND PATH    answered when the stream has begun; then a line:
//   UNTIL               count what comes, see records.h
// KIND is what the content is taken for: raw `records`, `lines` of JSON, or `words` of 64 bits.
#define _GNU_SOURCE
#include <poll.h>

#include "http.h"
#include "records.h"

#define LOST_MARK 0xFFFFFFFF
#define LOST_LINE "{\"lost\": "

// The following count what is whole of what has come, and return how many bytes that is.

static size_t records(struct found *found, const char *data, size_t size)
{
	size_t at = 0;

	while (size - at >= sizeof(uint32_t)) {
		const char *content = data + at + sizeof(uint32_t);
		uint64_t word = 0;
		uint32_t length;

		memcpy(&length, data + at, sizeof(length));
		if (length == LOST_MARK) {
			if (size - at < sizeof(length) + sizeof(word))
				break;
			memcpy(&word, content, sizeof(word));
			found->lost += word;
			at += sizeof(length) + sizeof(word);
			continue;
		}
		if (size - at < sizeof(length) + length)
			break;
		memcpy(&word, content, length < sizeof(word) ? length : sizeof(word));
		count(found, word);
		at += sizeof(length) + length;
	}
	return at;
}

static size_t lines(struct found *found, const char *data, size_t size)
{
	const char *line = data, *end;

	while ((end = memchr(line, '\n', size - (size_t)(line - data)))) {
		if (!strncmp(line, LOST_LINE, sizeof(LOST_LINE) - 1))
			found->lost += strtoull(line + sizeof(LOST_LINE) - 1, NULL, 10);
		else
			count(found, (uint64_t)(end - line));
		line = end + 1;
	}
	return (size_t)(line - data);
}

static size_t words(struct found *found, const char *data, size_t size)
{
	uint64_t word;
	size_t at = 0;

	for (; size - at >= sizeof(word); at += sizeof(word)) {
		memcpy(&word, data + at, sizeof(word));
		found->sum += word;
	}
	found->records += at / sizeof(word);
	return at;
}

typedef size_t counter(struct found *found, const char *data, size_t size);

static const struct kind {
	const char *name, *accept;
	counter *count;
} kinds[] = {
	{"records", "application/octet-stream", records},
	{"lines", "application/x-ndjson", lines},
	{"words", "application/octet-stream", words},
};

struct stream {
	const struct kind *kind;
	int fd;
	// What was read, and how much of it has been taken.
	char raw[(1 << 18) + 1];
	size_t got, at;
	// Of the chunk (RFC 9112, 7.1) that is being taken: its head, and what is left of it.
	char head[32];
	size_t head_held, left;
	int ended;
	// Content that has not been counted yet, and bytes of all.
	char content[1 << 19];
	size_t held, bytes;
};

static struct stream stream;

static void ask_for(const char *socket_path, const char *name, const char *path)
{
	stream.kind = NULL;
	for (size_t each = 0; each < sizeof(kinds) / sizeof(*kinds); each++)
		if (!strcmp(kinds[each].name, name))
			stream.kind = kinds + each;
	if (!stream.kind)
		exit(2);
	stream.head_held = stream.left = stream.held = stream.bytes = 0;
	stream.ended = 0;
	stream.fd = connect_to(socket_path);
	ask(stream.fd, "GET", path, stream.kind->accept);
}

// False: nothing comes any more.
static int receive(uint64_t until)
{
	struct pollfd polled = {stream.fd, POLLIN, 0};
	ssize_t got;

	while (!poll(&polled, 1, QUIET_MS))
		if (until && now_ns() > until)
			return 0;
	got = read(stream.fd, stream.raw, sizeof(stream.raw) - 1);
	if (got < 0)
		die("read");
	stream.got = (size_t)got;
	stream.at = 0;
	return got > 0;
}

// The head of the answer comes in one piece.
static void begin(void)
{
	char *start;

	if (!receive(0))
		exit(1);
	stream.raw[stream.got] = 0;
	start = content(stream.raw);
	if (!start)
		exit(1);
	stream.at = (size_t)(start - stream.raw);
}

static void take_head(void)
{
	char next = stream.raw[stream.at++];

	if (stream.head_held + 1 == sizeof(stream.head))
		exit(1);
	stream.head[stream.head_held++] = next;
	// A line end alone is that of the chunk before.
	if (next != '\n' || stream.head_held <= 2)
		return;
	stream.head[stream.head_held] = 0;
	stream.head_held = 0;
	stream.left = strtoul(stream.head, NULL, 16);
	stream.ended = !stream.left;
}

// Count all that was read, but for a part of a record or line at its end.
static void take(struct found *found)
{
	size_t part, whole;

	while (stream.at < stream.got && !stream.ended) {
		if (!stream.left) {
			take_head();
			continue;
		}
		part = stream.got - stream.at;
		if (part > stream.left)
			part = stream.left;
		memcpy(stream.content + stream.held, stream.raw + stream.at, part);
		stream.at += part;
		stream.left -= part;
		stream.held += part;
		stream.bytes += part;
	}
	whole = stream.kind->count(found, stream.content, stream.held);
	stream.held -= whole;
	memmove(stream.content, stream.content + whole, stream.held);
}

static struct found read_all(uint64_t until)
{
	struct found found = {.until = until};

	do
		take(&found);
	while (!stream.ended && receive(until));
	close(stream.fd);
	return found;
}

int main(int argc, char **argv)
{
	char line[512], kind[16], path[256];

	if (argc != 2)
		return 2;
	while (next_round(line, sizeof(line))) {
		struct found found;

		if (sscanf(line, "all %15s %255s", kind, path) == 2) {
			uint64_t begun = now_ns();

			ask_for(argv[1], kind, path);
			begin();
			found = read_all(0);
			if (!stream.ended)
				return 1;
			printf("{\"ns\": %llu, \"bytes\": %zu, \"records\": %llu, \"sum\": %llu}\n",
			       (unsigned long long)(now_ns() - begun), stream.bytes,
			       (unsigned long long)found.records, (unsigned long long)found.sum);
		} else if (sscanf(line, "follow %15s %255s", kind, path) == 2) {
			ask_for(argv[1], kind, path);
			begin();
			puts("{}");
			if (!next_round(line, sizeof(line)))
				return 1;
			found = read_all(strtoull(line, NULL, 10));
			answer_found(&found);
		} else {
			return 2;
		}
	}
	return 0;
}
