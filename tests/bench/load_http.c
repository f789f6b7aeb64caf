// SPDX-License-Identifier: Apache-2.0
// load_http PATH CONNECTIONS: each line on stdin is a Unix socket and a number of milliseconds;
// asks there for PATH that long, over so many kept connections, each with one request at a time.
#define _GNU_SOURCE
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "common.h"

#define MOST 64

struct connection {
	char buffer[1 << 16];
	size_t held;
};

static struct connection connections[MOST];
static struct pollfd polled[MOST];
static char request[512];
static size_t request_length;

static int connect_to(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (strlen(path) >= sizeof(address.sun_path)) {
		errno = ENAMETOOLONG;
		die(path);
	}
	strcpy(address.sun_path, path);
	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)))
		die(path);
	return fd;
}

static void ask(int fd)
{
	if (write(fd, request, request_length) != (ssize_t)request_length)
		die("write");
}

// Bytes of the whole answer; 0 while its head is not all there.
static size_t answer_length(struct connection *connection)
{
	char *end, *length;

	connection->buffer[connection->held] = 0;
	end = strstr(connection->buffer, "\r\n\r\n");
	if (!end)
		return 0;
	if (strncmp(connection->buffer, "HTTP/1.1 200 ", 13)) {
		fprintf(stderr, "not 200: %.60s\n", connection->buffer);
		exit(1);
	}
	length = strcasestr(connection->buffer, "\r\nContent-Length:");
	if (!length || length > end)
		exit(1);
	return (size_t)(end + 4 - connection->buffer) + strtoul(length + 17, NULL, 10);
}

static int receive(struct connection *connection, int fd)
{
	size_t room = sizeof(connection->buffer) - 1 - connection->held, wanted;
	ssize_t got = read(fd, connection->buffer + connection->held, room);

	if (got <= 0)
		die("read");
	connection->held += (size_t)got;
	wanted = answer_length(connection);
	if (!wanted || connection->held < wanted)
		return 0;
	connection->held = 0;
	return 1;
}

int main(int argc, char **argv)
{
	int count;
	char line[256];

	if (argc != 3)
		return 2;
	count = atoi(argv[2]);
	if (count < 1 || count > MOST)
		return 2;
	request_length = (size_t)snprintf(request, sizeof(request),
					  "GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n", argv[1]);
	while (next_round(line, sizeof(line))) {
		char *space = strchr(line, ' ');
		uint64_t begun, end, answers = 0;

		if (!space)
			return 2;
		*space = 0;
		for (int each = 0; each < count; each++) {
			connections[each].held = 0;
			polled[each] = (struct pollfd){connect_to(line), POLLIN, 0};
		}
		begun = now_ns();
		end = begun + strtoull(space + 1, NULL, 10) * 1000000;
		for (int each = 0; each < count; each++)
			ask(polled[each].fd);
		while (now_ns() < end) {
			if (poll(polled, (nfds_t)count, 1000) <= 0)
				die("poll");
			for (int each = 0; each < count; each++) {
				if (!polled[each].revents)
					continue;
				if (receive(&connections[each], polled[each].fd)) {
					answers++;
					ask(polled[each].fd);
				}
			}
		}
		printf("{\"answers\": %llu, \"ns\": %llu}\n", (unsigned long long)answers,
		       (unsigned long long)(now_ns() - begun));
		for (int each = 0; each < count; each++)
			close(polled[each].fd);
	}
	return 0;
}
