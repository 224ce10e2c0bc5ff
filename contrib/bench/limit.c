/*
 * limit - an NBD server that does what xnbd-server's request loop does, in C.
 *
 *   cc -O2 -o limit limit.c
 *   limit [--spin MICROSECONDS] PORT IMAGE
 *
 * It is the limit that the benchmark shows beside xnbd-server: the same technique
 * without an interpreter. One process a client receives as many requests as there
 * are into one buffer, answers all of them with one sendmsg() of headers and of
 * slices of the mapped image, and writes with pwrite(). It polls for at most
 * MICROSECONDS (150) before it sleeps, every time; 0 never polls.
 *
 * It is no server to use: it listens on 127.0.0.1 only, offers the image under any
 * name, trusts its clients, and knows READ, WRITE, FLUSH and DISC with simple
 * replies. Exit status 1: IMAGE or PORT cannot be used; 2: wrong usage.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define NBDMAGIC 0x4e42444d41474943ULL
#define IHAVEOPT 0x49484156454f5054ULL
#define OPTION_REPLY_MAGIC 0x0003e889045565a9ULL
#define REQUEST_MAGIC 0x25609513U
#define SIMPLE_REPLY_MAGIC 0x67446698U

enum { FLAG_FIXED_NEWSTYLE = 1, FLAG_NO_ZEROES = 2 };
enum { OPT_EXPORT_NAME = 1, OPT_ABORT = 2, OPT_INFO = 6, OPT_GO = 7 };
enum { REP_ACK = 1, REP_INFO = 3, REP_ERR_UNSUP = 0x80000001U };
enum { HAS_FLAGS = 1, SEND_FLUSH = 4, SEND_FUA = 8, CAN_MULTI_CONN = 256 };
enum { CMD_READ = 0, CMD_WRITE = 1, CMD_DISC = 2, CMD_FLUSH = 3 };

#define EXPORT_FLAGS (HAS_FLAGS | SEND_FLUSH | SEND_FUA | CAN_MULTI_CONN)
#define FLAG_FUA 1
#define BUFFER (1 << 20)   /* received at once, as in the server that this is compared with */
#define VECTOR 1024        /* IOV_MAX */
#define MAX_OPTION 65536

struct request {
	uint32_t magic;
	uint16_t flags, type;
	uint64_t cookie, offset;
	uint32_t length;
} __attribute__((packed));

struct reply {
	uint32_t magic, error;
	uint64_t cookie;
} __attribute__((packed));

static uint64_t size;
static char *disk;
static int disk_fd;
static uint64_t spin = 150000; /* nanoseconds */
static int client;

static char *buffer;
static size_t start, end; /* of what was received and not worked through */

static struct reply replies[VECTOR];
static struct iovec pieces[VECTOR];
static int headers, count; /* replies and pieces that have not left */

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

/* Receive at least one byte; a client that has left ends the process. */
static size_t receive(void *to, size_t room)
{
	struct pollfd ready = {.fd = client, .events = POLLIN};
	ssize_t got = recv(client, to, room, MSG_DONTWAIT);

	if (got < 0 && spin) {
		uint64_t until = now() + spin;

		while (got < 0 && errno == EAGAIN && now() < until)
			if (poll(&ready, 1, 0) > 0)
				got = recv(client, to, room, MSG_DONTWAIT);
			else
				errno = EAGAIN;
	}
	while (got < 0 && (errno == EAGAIN || errno == EINTR)) {
		poll(&ready, 1, -1);
		got = recv(client, to, room, MSG_DONTWAIT);
	}
	if (got <= 0)
		_exit(0);
	return got;
}

static void receive_all(void *to, size_t length)
{
	while (length) {
		size_t got = receive(to, length);

		to = (char *)to + got;
		length -= got;
	}
}

static void send_all(const void *from, size_t length)
{
	while (length) {
		ssize_t sent = send(client, from, length, MSG_NOSIGNAL);

		if (sent < 0)
			_exit(0);
		from = (const char *)from + sent;
		length -= sent;
	}
}

/* All replies at once; what is left of a short send leaves with the next. */
static void send_replies(void)
{
	struct iovec *next = pieces;

	while (count) {
		struct msghdr message = {.msg_iov = next, .msg_iovlen = count};
		ssize_t sent = sendmsg(client, &message, MSG_NOSIGNAL);

		if (sent < 0)
			_exit(0);
		while (count && (size_t)sent >= next->iov_len) {
			sent -= next->iov_len;
			next++;
			count--;
		}
		if (count) {
			next->iov_base = (char *)next->iov_base + sent;
			next->iov_len -= sent;
		}
	}
	headers = 0;
}

static void add(void *from, size_t length)
{
	pieces[count].iov_base = from;
	pieces[count++].iov_len = length;
}

static void answer(uint64_t cookie, int error, uint64_t offset, uint32_t length)
{
	struct reply *reply;

	if (count + 2 > VECTOR || headers == VECTOR)
		send_replies();
	reply = &replies[headers++];
	reply->magic = htobe32(SIMPLE_REPLY_MAGIC);
	reply->error = htobe32(error);
	reply->cookie = cookie;
	add(reply, sizeof *reply);
	if (length)
		add(disk + offset, length);
}

static int put(const char *from, size_t length, uint64_t offset)
{
	while (length) {
		ssize_t written = pwrite(disk_fd, from, length, offset);

		if (written < 0)
			return errno == ENOSPC ? 28 : 5;
		from += written;
		length -= written;
		offset += written;
	}
	return 0;
}

static void to_front(void)
{
	memmove(buffer, buffer + start, end - start);
	end -= start;
	start = 0;
}

/* A payload that does not fit the buffer goes to the disk as it comes. */
static int put_long(uint64_t offset, size_t length)
{
	int error = 0;

	while (length) {
		size_t have;

		if (start == end)
			start = end = 0;
		while (end - start < length && end < BUFFER)
			end += receive(buffer + end, BUFFER - end);
		have = end - start < length ? end - start : length;
		if (!error)
			error = put(buffer + start, have, offset);
		start += have;
		offset += have;
		length -= have;
		to_front();
	}
	return error;
}

/* The requests that are there; 0 if the next one is not complete. */
static int work(void)
{
	const struct request *request = (void *)(buffer + start);
	uint64_t offset = be64toh(request->offset), cookie = request->cookie;
	uint32_t length = be32toh(request->length);
	int type = be16toh(request->type), fua = be16toh(request->flags) & FLAG_FUA, error;

	if (request->magic != htobe32(REQUEST_MAGIC) || type == CMD_DISC) {
		send_replies();
		_exit(0);
	}
	if ((type == CMD_READ || type == CMD_WRITE) && (offset > size || length > size - offset))
		_exit(1);
	switch (type) {
	case CMD_READ:
		start += sizeof *request;
		answer(cookie, 0, offset, length);
		return 1;
	case CMD_WRITE:
		if (sizeof *request + length <= BUFFER) {
			if (end - start < sizeof *request + length)
				return 0;
			error = put(buffer + start + sizeof *request, length, offset);
			start += sizeof *request + length;
		} else {
			send_replies();
			start += sizeof *request;
			error = put_long(offset, length);
		}
		if (fua && !error && fdatasync(disk_fd))
			error = 5;
		answer(cookie, error, 0, 0);
		return 1;
	default:
		start += sizeof *request;
		error = type != CMD_FLUSH ? 22 : fdatasync(disk_fd) ? 5 : 0;
		answer(cookie, error, 0, 0);
		return 1;
	}
}

static void reply_to_option(uint32_t option, uint32_t type, const void *data, uint32_t length)
{
	struct {
		uint64_t magic;
		uint32_t option, type, length;
	} __attribute__((packed)) header = {htobe64(OPTION_REPLY_MAGIC), htobe32(option), htobe32(type), htobe32(length)};

	send_all(&header, sizeof header);
	send_all(data, length);
}

static void negotiate(void)
{
	struct {
		uint64_t magic, style;
		uint16_t flags;
	} __attribute__((packed)) greeting = {htobe64(NBDMAGIC), htobe64(IHAVEOPT), htobe16(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)};
	struct {
		uint16_t kind;
		uint64_t size;
		uint16_t flags;
	} __attribute__((packed)) info = {0, htobe64(size), htobe16(EXPORT_FLAGS)};
	struct {
		uint64_t magic;
		uint32_t option, length;
	} __attribute__((packed)) option;
	static char data[MAX_OPTION], zeroes[124];
	uint32_t flags;

	send_all(&greeting, sizeof greeting);
	receive_all(&flags, sizeof flags);
	for (;;) {
		receive_all(&option, sizeof option);
		if (be32toh(option.length) > MAX_OPTION)
			_exit(1);
		receive_all(data, be32toh(option.length));
		switch (be32toh(option.option)) {
		case OPT_EXPORT_NAME:
			send_all((char *)&info + sizeof info.kind, sizeof info - sizeof info.kind);
			if (!(be32toh(flags) & FLAG_NO_ZEROES))
				send_all(zeroes, sizeof zeroes);
			return;
		case OPT_INFO:
		case OPT_GO:
			reply_to_option(be32toh(option.option), REP_INFO, &info, sizeof info);
			reply_to_option(be32toh(option.option), REP_ACK, NULL, 0);
			if (be32toh(option.option) == OPT_GO)
				return;
			break;
		case OPT_ABORT:
			_exit(0);
		default:
			reply_to_option(be32toh(option.option), REP_ERR_UNSUP, NULL, 0);
		}
	}
}

static void serve(void)
{
	int on = 1;

	setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	buffer = mmap(NULL, BUFFER, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	negotiate();
	for (;;) {
		if (start == end)
			start = end = 0;
		else if (start > BUFFER / 2 || end == BUFFER)
			to_front();
		end += receive(buffer + end, BUFFER - end);
		while (end - start >= sizeof(struct request) && work())
			;
		send_replies();
	}
}

static int listen_on(int port)
{
	struct sockaddr_in address = {
		.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;

	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (bind(listener, (void *)&address, sizeof address) || listen(listener, 128)) {
		perror("limit: port");
		exit(1);
	}
	return listener;
}

static void usage(void)
{
	fputs("limit: usage: limit [--spin MICROSECONDS] PORT IMAGE\n", stderr);
	exit(2);
}

int main(int argc, char **argv)
{
	static const struct option options[] = {{"spin", required_argument, NULL, 's'}, {0}};
	int option, listener;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (option != 's')
			usage();
		spin = strtoull(optarg, NULL, 10) * 1000;
	}
	if (argc - optind != 2)
		usage();
	disk_fd = open(argv[optind + 1], O_RDWR | O_CLOEXEC);
	size = disk_fd < 0 ? 0 : lseek(disk_fd, 0, SEEK_END);
	disk = size ? mmap(NULL, size, PROT_READ, MAP_SHARED, disk_fd, 0) : MAP_FAILED;
	if (disk == MAP_FAILED) {
		perror("limit: image");
		return 1;
	}
	madvise(disk, size, MADV_RANDOM);
	listener = listen_on(atoi(argv[optind]));
	signal(SIGCHLD, SIG_IGN);
	for (;;) {
		client = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
		if (client >= 0 && !fork()) {
			prctl(PR_SET_PDEATHSIG, SIGTERM);
			close(listener);
			serve();
		}
		close(client);
	}
}
