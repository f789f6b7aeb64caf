// SPDX-License-Identifier: Apache-2.0
// What the programs that ask kpmd share: a connection, a request on it, and the head of its answer.
#pragma once

#include <strings.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "common.h"

static inline int connect_to(const char *path)
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

static inline void ask(int fd, const char *method, const char *path, const char *accept)
{
	char request[1024];
	int length = snprintf(request, sizeof(request),
			      "%s %s HTTP/1.1\r\nHost: localhost\r\nAccept: %s\r\n"
			      "Content-Length: 0\r\n\r\n",
			      method, path, accept);

	if (length >= (int)sizeof(request) || write(fd, request, (size_t)length) != length)
		die("request");
}

// Where the content begins in an answer of 200, held with a NUL behind it; NULL: more is to come.
static inline char *content(char *held)
{
	char *end = strstr(held, "\r\n\r\n");

	if (!end)
		return NULL;
	if (strncmp(held, "HTTP/1.1 200 ", 13)) {
		fprintf(stderr, "not 200: %.400s\n", held);
		exit(1);
	}
	return end + 4;
}

// POST /maps/{id}/fd: the map's file descriptor, which comes beside the answer's first byte.
static inline int handed_over(const char *socket_path, const char *map)
{
	union {
		struct cmsghdr head;
		char room[CMSG_SPACE(sizeof(int))];
	} control;
	char path[128], held[4096];
	struct iovec into = {held, sizeof(held) - 1};
	struct msghdr message = {.msg_iov = &into,
				 .msg_iovlen = 1,
				 .msg_control = &control,
				 .msg_controllen = sizeof(control)};
	struct cmsghdr *beside;
	int connection = connect_to(socket_path), fd;
	ssize_t got;

	snprintf(path, sizeof(path), "/maps/%s/fd", map);
	ask(connection, "POST", path, "*/*");
	got = recvmsg(connection, &message, MSG_CMSG_CLOEXEC);
	if (got <= 0)
		die("recvmsg");
	held[got] = 0;
	beside = CMSG_FIRSTHDR(&message);
	if (!content(held) || !beside || beside->cmsg_type != SCM_RIGHTS) {
		errno = ENOMSG;
		die(path);
	}
	memcpy(&fd, CMSG_DATA(beside), sizeof(fd));
	close(connection);
	return fd;
}
