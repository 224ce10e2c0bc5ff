/*
 * nbdload - a lean NBD client that measures servers rather than itself.
 *
 *   cc -O2 -pthread -o nbdload nbdload.c nbdload_tls.c
 *   cc -O2 -pthread -DWITH_TLS -o nbdload nbdload.c nbdload_tls.c -lssl -lcrypto
 *   nbdload [options] HOST PORT
 *   nbdload [options] SOCKET_PATH
 *
 * Load (default): keep requests in flight for some seconds.
 *   --op OP           read, write, randread or randwrite     (randread)
 *   --bytes N         bytes per request                      (4096)
 *   --depth N         requests in flight per connection      (1)
 *   --connections N   each in a thread of its own            (1)
 *   --seconds S       time that counts                       (1)
 *   --warmup S        time before it that does not           (0)
 *   --seed N          which random offsets                   (1)
 *   --separate        one send() per request; without it, requests that become
 *                     due together leave together
 *   --span BYTES      use only so much of the disk, from its start (all)
 *   --once            instead of --seconds and --warmup: ask for each block of
 *                     --bytes once, at random without repetition with rand*, and
 *                     end when all are answered; connections share the blocks
 *   --limit N         with --once: no more than N blocks        (all)
 *   --pending N       before that send N reads of 4 KiB of the last blocks of the
 *                     disk on each connection, which must not be answered
 * --first N: N times connect, negotiate, read 4 KiB, disconnect; the time from
 *   connect to the data counts.
 *   --pause S         wait between two of them               (0)
 * --idle N: open and hold N negotiated connections until standard input ends.
 *
 * All modes:
 *   --export NAME     name of the export                     (empty)
 *   --export-name     negotiate with EXPORT_NAME, not GO; oldstyle is recognised
 *   --tls DIR         TLS: DIR has ca-cert.pem, and client-cert.pem and client-key.pem
 *                     for servers that want them; HOST must be in the server's certificate
 *
 * Prints one line of JSON. Exit status 1: an error reply, a reply that answers
 * nothing, a broken connection, or no answer for 30 s; 2: wrong usage.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <getopt.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "nbdload_tls.h"

#define NBDMAGIC 0x4e42444d41474943ULL
#define IHAVEOPT 0x49484156454f5054ULL
#define OLDSTYLE_MAGIC 0x0000420281861253ULL
#define OPTION_REPLY_MAGIC 0x0003e889045565a9ULL
#define REQUEST_MAGIC 0x25609513U
#define SIMPLE_REPLY_MAGIC 0x67446698U

enum { FLAG_FIXED_NEWSTYLE = 1, FLAG_NO_ZEROES = 2 };
enum { OPT_EXPORT_NAME = 1, OPT_STARTTLS = 5, OPT_GO = 7 };
enum { REP_ACK = 1, REP_INFO = 3, REP_FLAG_ERROR = 0x80000000U };
enum { INFO_EXPORT = 0 };
enum { CMD_READ = 0, CMD_WRITE = 1, CMD_DISC = 2 };

#define SILENCE 30                /* seconds without an answer that end the run */
#define RECEIVE_ROOM (512 << 10)  /* stays in the CPU's cache, holds a full window of small replies */
#define SEND_VECTOR 512           /* buffers per sendmsg(), below IOV_MAX */
#define MAX_DEPTH 65536
#define MAX_BYTES (64 << 20)
#define NANO 1000000000ULL

struct request {
	uint32_t magic;
	uint16_t flags, type;
	uint64_t cookie, offset;
	uint32_t length;
} __attribute__((packed));

struct simple_reply {
	uint32_t magic, error;
	uint64_t cookie;
} __attribute__((packed));

struct option_reply {
	uint64_t magic;
	uint32_t option, type, length;
} __attribute__((packed));

static struct {
	const char *host, *port; /* port NULL: host is the path of a Unix socket */
	const char *export;
	const char *op;
	const char *tls; /* directory of certificates; NULL: no TLS */
	size_t bytes;
	int depth, connections, first, idle, pending;
	int writing, random, separate, export_name, once;
	uint64_t seconds, warmup, pause; /* nanoseconds */
	uint64_t seed, span, limit;      /* 0: all */
} conf = {
	.export = "", .op = "randread", .bytes = 4096, .depth = 1, .connections = 1, .seconds = NANO, .seed = 1,
};

static void die(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));
static void die(const char *format, ...)
{
	va_list args;

	flockfile(stderr); /* never released: one thread's message is enough */
	fputs("nbdload: ", stderr);
	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fputc('\n', stderr);
	_exit(1);
}

static void *allocate(size_t size)
{
	void *memory = calloc(1, size);

	if (!memory)
		die("out of memory");
	return memory;
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * NANO + t.tv_nsec;
}

static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	return *state ^= *state << 17;
}

/* Histogram of nanoseconds: STEPS buckets per power of two, so within 1 % of the truth. */

#define STEP_BITS 7
#define STEPS (1 << STEP_BITS)

struct histogram {
	uint64_t count, longest;
	uint64_t buckets[(64 - STEP_BITS + 1) * STEPS];
};

static int bucket_of(uint64_t value)
{
	int shift;

	if (value < STEPS)
		return value;
	shift = 63 - __builtin_clzll(value) - STEP_BITS;
	return (shift + 1) * STEPS + (value >> shift) - STEPS;
}

/* The middle of a bucket. */
static uint64_t value_of(int bucket)
{
	int shift = bucket / STEPS - 1;

	if (shift < 0)
		return bucket;
	return ((uint64_t)(STEPS + bucket % STEPS) << shift) + ((1ULL << shift) >> 1);
}

static void record(struct histogram *h, uint64_t value)
{
	h->count++;
	h->buckets[bucket_of(value)]++;
	if (value > h->longest)
		h->longest = value;
}

static void merge(struct histogram *into, const struct histogram *from)
{
	into->count += from->count;
	if (from->longest > into->longest)
		into->longest = from->longest;
	for (size_t i = 0; i < sizeof into->buckets / sizeof *into->buckets; i++)
		into->buckets[i] += from->buckets[i];
}

static uint64_t percentile(const struct histogram *h, double percent)
{
	uint64_t wanted = h->count * percent / 100, seen = 0;
	size_t i;

	for (i = 0; i < sizeof h->buckets / sizeof *h->buckets; i++)
		if ((seen += h->buckets[i]) > wanted)
			break;
	return value_of(i) < h->longest ? value_of(i) : h->longest;
}

static void print_latencies(const struct histogram *h)
{
	printf("\"p50_us\": %.2f, \"p99_us\": %.2f, \"max_us\": %.2f", percentile(h, 50) / 1e3, percentile(h, 99) / 1e3,
	       h->longest / 1e3);
}

/* Links: sockets, with TLS or without */

struct link {
	int fd;
	struct tls *tls;       /* NULL: in the clear */
	uint32_t client_flags; /* of the handshake */
	int greeted;           /* whether they have been sent */
};

/* What has come, at least one byte; ends the program if nothing does. */
static size_t receive_part(struct link *link, void *to, size_t length, int flags)
{
	ssize_t n;

	do
		n = link->tls ? tls_receive(link->tls, to, length) : recv(link->fd, to, length, flags);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		die("receive: %s", errno == EAGAIN ? "no answer" : strerror(errno));
	if (!n)
		die("the server closed the connection");
	return n;
}

static void receive(struct link *link, void *to, size_t length)
{
	char *at = to;

	while (length) {
		size_t n = receive_part(link, at, length, MSG_WAITALL);

		at += n;
		length -= n;
	}
}

static void cannot_send(void) __attribute__((noreturn));
static void cannot_send(void)
{
	die("send: %s", errno == EAGAIN ? "the server does not receive" : strerror(errno));
}

static void transmit_clear(int fd, struct iovec *vector, size_t count)
{
	while (count) {
		struct msghdr message = { .msg_iov = vector, .msg_iovlen = count };
		ssize_t n = sendmsg(fd, &message, MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			cannot_send();
		for (; count && (size_t)n >= vector->iov_len; count--)
			n -= vector++->iov_len;
		if (count) {
			vector->iov_base = (char *)vector->iov_base + n;
			vector->iov_len -= n;
		}
	}
}

/* Small buffers share a record: each record is a cipher's run of its own. */
static void transmit_tls(struct tls *tls, const struct iovec *vector, size_t count)
{
	char record[16 << 10];
	size_t held = 0;

	for (size_t i = 0; i < count; i++) {
		const char *from = vector[i].iov_base;
		size_t left = vector[i].iov_len;

		while (left) {
			size_t part = left < sizeof record - held ? left : sizeof record - held;

			memcpy(record + held, from, part);
			held += part;
			from += part;
			left -= part;
			if (held == sizeof record && tls_send(tls, record, held))
				cannot_send();
			held %= sizeof record;
		}
	}
	if (tls_send(tls, record, held) || tls_flush(tls))
		cannot_send();
}

static void transmit_vector(struct link *link, struct iovec *vector, size_t count)
{
	if (link->tls)
		transmit_tls(link->tls, vector, count);
	else
		transmit_clear(link->fd, vector, count);
}

static void transmit(struct link *link, const void *from, size_t length)
{
	struct iovec one = { (void *)from, length };

	transmit_vector(link, &one, 1);
}

static int connect_unix(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	if (strlen(path) >= sizeof address.sun_path)
		die("%s: path too long for a socket", path);
	strcpy(address.sun_path, path);
	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address))
		die("connect to %s: %s", path, strerror(errno));
	return fd;
}

static struct addrinfo *resolve(const char *host, const char *port)
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM }, *found;
	int error = getaddrinfo(host, port, &hints, &found);

	if (error)
		die("%s port %s: %s", host, port, gai_strerror(error));
	return found;
}

static int connect_tcp(const struct addrinfo *address)
{
	int fd = socket(address->ai_family, SOCK_STREAM, 0), one = 1;

	if (fd < 0 || connect(fd, address->ai_addr, address->ai_addrlen))
		die("connect to %s port %s: %s", conf.host, conf.port, strerror(errno));
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	return fd;
}

static struct link dial(void)
{
	static struct addrinfo *address;
	static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
	struct timeval silence = { .tv_sec = SILENCE };
	int fd;

	if (conf.port) {
		pthread_mutex_lock(&once);
		if (!address)
			address = resolve(conf.host, conf.port);
		pthread_mutex_unlock(&once);
		fd = connect_tcp(address);
	} else {
		fd = connect_unix(conf.host);
	}
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &silence, sizeof silence);
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &silence, sizeof silence);
	return (struct link){ .fd = fd };
}

/* Negotiation: each returns the size of the export. */

static uint64_t finish_oldstyle(struct link *link)
{
	struct {
		uint64_t size;
		uint32_t flags;
		char zeroes[124];
	} __attribute__((packed)) rest;

	receive(link, &rest, sizeof rest);
	return be64toh(rest.size);
}

/* Client flags leave with the first option, in one send: the server reads them one after the other. */
static void send_option(struct link *link, uint32_t option, const void *data, uint32_t length)
{
	struct {
		uint32_t client_flags;
		uint64_t magic;
		uint32_t option, length;
	} __attribute__((packed)) header = { htobe32(link->client_flags), htobe64(IHAVEOPT), htobe32(option), htobe32(length) };
	size_t skip = link->greeted ? sizeof header.client_flags : 0;
	struct iovec vector[] = { { (char *)&header + skip, sizeof header - skip }, { (void *)data, length } };

	link->greeted = 1;
	transmit_vector(link, vector, 2);
}

static struct option_reply receive_option_reply(struct link *link, void *data, size_t room)
{
	struct option_reply reply;

	receive(link, &reply, sizeof reply);
	if (be64toh(reply.magic) != OPTION_REPLY_MAGIC || be32toh(reply.length) > room)
		die("malformed option reply");
	receive(link, data, be32toh(reply.length));
	return reply;
}

static void start_tls(struct link *link)
{
	unsigned char data[65536];
	struct option_reply reply;
	const char *why;

	send_option(link, OPT_STARTTLS, NULL, 0);
	reply = receive_option_reply(link, data, sizeof data);
	if (be32toh(reply.type) != REP_ACK)
		die("the server refuses TLS: error %#x", be32toh(reply.type));
	link->tls = tls_start(link->fd, conf.tls, conf.port ? conf.host : NULL, &why);
	if (!link->tls)
		die("TLS: %s", why);
}

static uint64_t choose_with_export_name(struct link *link)
{
	struct {
		uint64_t size;
		uint16_t flags;
		char zeroes[124];
	} __attribute__((packed)) answer;

	send_option(link, OPT_EXPORT_NAME, conf.export, strlen(conf.export));
	receive(link, &answer, sizeof answer - (link->client_flags & FLAG_NO_ZEROES ? sizeof answer.zeroes : 0));
	return be64toh(answer.size);
}

static void send_go(struct link *link)
{
	struct {
		uint32_t length;
		char name_and_count[4096 + 2]; /* no information requested beyond INFO_EXPORT */
	} __attribute__((packed)) data = { 0 };
	size_t length = strlen(conf.export);

	data.length = htobe32(length);
	memcpy(data.name_and_count, conf.export, length);
	send_option(link, OPT_GO, &data, sizeof data.length + length + 2);
}

static uint64_t choose_with_go(struct link *link)
{
	struct option_reply reply;
	unsigned char data[65536];
	uint64_t size = 0;
	uint16_t kind;

	send_go(link);
	for (;;) {
		reply = receive_option_reply(link, data, sizeof data);
		if (be32toh(reply.type) == REP_ACK)
			return size;
		if (be32toh(reply.type) & REP_FLAG_ERROR)
			die("the server refuses export \"%s\": error %#x", conf.export, be32toh(reply.type));
		memcpy(&kind, data, sizeof kind);
		if (be32toh(reply.type) == REP_INFO && be32toh(reply.length) >= 12 && be16toh(kind) == INFO_EXPORT) {
			memcpy(&size, data + 2, sizeof size);
			size = be64toh(size);
		}
	}
}

static uint64_t negotiate(struct link *link)
{
	uint64_t magics[2];
	uint16_t server_flags;

	receive(link, magics, sizeof magics);
	if (be64toh(magics[0]) != NBDMAGIC)
		die("not an NBD server");
	if (be64toh(magics[1]) == OLDSTYLE_MAGIC && !conf.tls)
		return finish_oldstyle(link);
	if (be64toh(magics[1]) != IHAVEOPT)
		die("unknown style of negotiation");
	receive(link, &server_flags, sizeof server_flags);
	link->client_flags = be16toh(server_flags) & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
	if (conf.tls)
		start_tls(link);
	return conf.export_name ? choose_with_export_name(link) : choose_with_go(link);
}

static void disconnect(struct link *link)
{
	struct request bye = { .magic = htobe32(REQUEST_MAGIC), .type = htobe16(CMD_DISC) };

	/* A server that is gone already is as good. */
	if (link->tls) {
		tls_send(link->tls, &bye, sizeof bye);
		tls_end(link->tls);
	} else {
		send(link->fd, &bye, sizeof bye, MSG_NOSIGNAL);
	}
	close(link->fd);
}

/*
 * Load. A slot is a request that can be in flight; its number is the cookie,
 * and sent_at tells whether and since when it is.
 */

struct load {
	struct link link;
	int number;
	uint64_t blocks, cursor, random;
	uint64_t left;             /* blocks to ask for yet, with --once */
	uint32_t *order;           /* of all blocks, with --once and rand* */
	uint64_t *sent_at;         /* per slot, 0: not in flight */
	uint32_t *free_slots;
	int free_count, flying;
	struct request *queue;     /* requests made and not sent yet */
	int queued;
	char *payload, *room;
	size_t have;               /* bytes in room that are not understood yet */
	size_t data_due;           /* bytes of read data that belong to slot `answered` */
	uint32_t answered;
	uint64_t begin, end;       /* what is answered between them counts */
	uint64_t finished;         /* when the last one was answered */
	struct histogram latencies;
};

static pthread_barrier_t everyone_negotiated;

static uint64_t next_offset(struct load *l)
{
	if (l->order)
		return (uint64_t)l->order[l->cursor++] * conf.bytes;
	return (conf.random ? next_random(&l->random) : l->cursor++) % l->blocks * conf.bytes;
}

static void send_queued(struct load *l)
{
	struct iovec vector[SEND_VECTOR];
	size_t count = 0;

	if (!conf.writing) {
		transmit(&l->link, l->queue, l->queued * sizeof *l->queue);
		l->queued = 0;
		return;
	}
	for (int i = 0; i < l->queued; i++) {
		vector[count++] = (struct iovec){ &l->queue[i], sizeof *l->queue };
		vector[count++] = (struct iovec){ l->payload, conf.bytes };
		if (count == SEND_VECTOR || i == l->queued - 1) {
			transmit_vector(&l->link, vector, count);
			count = 0;
		}
	}
	l->queued = 0;
}

static void issue(struct load *l, uint64_t time)
{
	while (l->free_count && l->left) {
		uint32_t slot = l->free_slots[--l->free_count];

		l->queue[l->queued++] = (struct request){
			.magic = htobe32(REQUEST_MAGIC),
			.type = htobe16(conf.writing ? CMD_WRITE : CMD_READ),
			.cookie = htobe64(slot),
			.offset = htobe64(next_offset(l)),
			.length = htobe32(conf.bytes),
		};
		l->sent_at[slot] = time;
		l->flying++;
		l->left -= conf.once;
		if (conf.separate)
			send_queued(l);
	}
	if (l->queued)
		send_queued(l);
}

static void finish(struct load *l, uint32_t slot, uint64_t time)
{
	if (time >= l->begin && time < l->end)
		record(&l->latencies, time - l->sent_at[slot]);
	l->sent_at[slot] = 0;
	l->free_slots[l->free_count++] = slot;
	l->flying--;
	l->finished = time;
}

static void on_reply(struct load *l, const char *from, uint64_t time)
{
	struct simple_reply reply;
	uint64_t slot;

	memcpy(&reply, from, sizeof reply);
	slot = be64toh(reply.cookie);
	if (be32toh(reply.magic) != SIMPLE_REPLY_MAGIC)
		die("bad reply magic %#x", be32toh(reply.magic));
	if (reply.error)
		die("error reply %u", be32toh(reply.error));
	if (slot >= (uint64_t)conf.depth || !l->sent_at[slot])
		die("a reply to no request: cookie %#llx", (unsigned long long)slot);
	if (conf.writing) {
		finish(l, slot, time);
	} else {
		l->answered = slot;
		l->data_due = conf.bytes;
	}
}

/* Work through what was received; an incomplete reply header stays in room. */
static void digest(struct load *l, uint64_t time)
{
	size_t at = 0;

	for (;;) {
		if (l->data_due) {
			size_t part = l->have - at < l->data_due ? l->have - at : l->data_due;

			at += part;
			l->data_due -= part;
			if (l->data_due)
				break;
			finish(l, l->answered, time);
		}
		if (l->have - at < sizeof(struct simple_reply))
			break;
		on_reply(l, l->room + at, time);
		at += sizeof(struct simple_reply);
	}
	l->have -= at;
	memmove(l->room, l->room + at, l->have);
}

static void receive_some(struct load *l)
{
	l->have += receive_part(&l->link, l->room + l->have, RECEIVE_ROOM - l->have, 0);
}

static void prepare(struct load *l)
{
	l->random = (conf.seed * 1000003 + l->number) * 0x9e3779b97f4a7c15ULL | 1;
	l->sent_at = allocate(conf.depth * sizeof *l->sent_at);
	l->free_slots = allocate(conf.depth * sizeof *l->free_slots);
	l->queue = allocate(conf.depth * sizeof *l->queue);
	l->room = allocate(RECEIVE_ROOM);
	l->payload = allocate(conf.bytes);
	for (size_t i = 0; i < conf.bytes; i++)
		l->payload[i] = next_random(&l->random);
	for (int i = 0; i < conf.depth; i++)
		l->free_slots[l->free_count++] = i;
}

/* The same permutation for all connections, of which each has its share. */
static uint32_t *shuffle(uint64_t blocks)
{
	uint64_t random = (conf.seed + 1) * 0x9e3779b97f4a7c15ULL | 1, i, j;
	uint32_t *order;

	if (blocks > UINT32_MAX)
		die("too many blocks for --once: give --span");
	order = allocate(blocks * sizeof *order);
	for (i = 0; i < blocks; i++) {
		j = next_random(&random) % (i + 1);
		order[i] = order[j];
		order[j] = i;
	}
	return order;
}

static void share_blocks(struct load *l)
{
	uint64_t all = conf.limit && conf.limit < l->blocks ? conf.limit : l->blocks;

	l->cursor = l->number * (l->blocks / conf.connections);
	l->left = 1;
	if (!conf.once)
		return;
	l->cursor = all * l->number / conf.connections;
	l->left = all * (l->number + 1) / conf.connections - l->cursor;
	if (conf.random)
		l->order = shuffle(l->blocks);
}

/* Their cookies are those of no slot: an answer to one of them ends the run. */
static void send_pending(struct load *l, uint64_t size)
{
	for (int i = 0; i < conf.pending; i++) {
		struct request request = {
			.magic = htobe32(REQUEST_MAGIC),
			.type = htobe16(CMD_READ),
			.cookie = htobe64(MAX_DEPTH + i),
			.offset = htobe64((size / 4096 - 1 - i - (uint64_t)l->number * conf.pending) * 4096),
			.length = htobe32(4096),
		};

		transmit(&l->link, &request, sizeof request);
	}
}

static void open_load(struct load *l)
{
	uint64_t size, used;

	l->link = dial();
	size = negotiate(&l->link);
	used = conf.span && conf.span < size ? conf.span : size;
	l->blocks = used / conf.bytes;
	if (!l->blocks)
		die("the export is smaller than one request");
	if ((size - used) / 4096 < (uint64_t)conf.pending * conf.connections)
		die("no room for pending reads beyond --span");
	send_pending(l, size);
	share_blocks(l);
}

static void *run_load(void *argument)
{
	struct load *l = argument;
	uint64_t time;

	prepare(l);
	open_load(l);
	pthread_barrier_wait(&everyone_negotiated);
	time = now();
	l->begin = conf.once ? time : time + conf.warmup;
	l->end = conf.once ? UINT64_MAX : l->begin + conf.seconds;
	for (;;) {
		if (time < l->end)
			issue(l, time);
		if (!l->flying)
			break;
		receive_some(l);
		time = now();
		digest(l, time);
	}
	disconnect(&l->link);
	return NULL;
}

static void measure_load(void)
{
	struct load *loads = allocate(conf.connections * sizeof *loads);
	pthread_t *threads = allocate(conf.connections * sizeof *threads);
	struct histogram *all = allocate(sizeof *all);
	uint64_t begin = UINT64_MAX, finished = 0;
	double seconds, rate;

	pthread_barrier_init(&everyone_negotiated, NULL, conf.connections);
	for (int i = 0; i < conf.connections; i++) {
		loads[i].number = i;
		if (pthread_create(&threads[i], NULL, run_load, &loads[i]))
			die("cannot start a thread");
	}
	for (int i = 0; i < conf.connections; i++) {
		pthread_join(threads[i], NULL);
		merge(all, &loads[i].latencies);
		begin = loads[i].begin < begin ? loads[i].begin : begin;
		finished = loads[i].finished > finished ? loads[i].finished : finished;
	}
	if (!all->count)
		die("no request was answered in the time that counts");
	seconds = (conf.once ? finished - begin : conf.seconds) / 1e9;
	rate = all->count / seconds;
	printf("{\"op\": \"%s\", \"bytes\": %zu, \"depth\": %d, \"connections\": %d, \"seconds\": %.3f, \"requests\": %llu, "
	       "\"iops\": %.0f, \"mb_per_s\": %.1f, ",
	       conf.op, conf.bytes, conf.depth, conf.connections, seconds, (unsigned long long)all->count, rate,
	       rate * conf.bytes / 1e6);
	print_latencies(all);
	puts("}");
}

/* First read */

static void sleep_for(uint64_t nanoseconds)
{
	struct timespec t = { nanoseconds / NANO, nanoseconds % NANO };

	if (nanoseconds)
		nanosleep(&t, NULL);
}

static uint64_t time_first_read(void)
{
	struct request request = {
		.magic = htobe32(REQUEST_MAGIC), .type = htobe16(CMD_READ), .length = htobe32(4096),
	};
	struct {
		struct simple_reply header;
		char data[4096];
	} answer;
	uint64_t start = now(), time;
	struct link link = dial();

	if (negotiate(&link) < sizeof answer.data)
		die("the export is smaller than one request");
	transmit(&link, &request, sizeof request);
	receive(&link, &answer.header, sizeof answer.header);
	if (be32toh(answer.header.magic) != SIMPLE_REPLY_MAGIC || answer.header.error)
		die("the first read failed: error %u", be32toh(answer.header.error));
	receive(&link, answer.data, sizeof answer.data);
	time = now() - start;
	disconnect(&link);
	return time;
}

static void measure_first_reads(void)
{
	struct histogram *h = allocate(sizeof *h);

	for (int i = 0; i < conf.first; i++) {
		record(h, time_first_read());
		sleep_for(conf.pause);
	}
	printf("{\"first\": %d, \"median_ms\": %.4f, ", conf.first, percentile(h, 50) / 1e6);
	print_latencies(h);
	puts("}");
}

/* Idle connections */

static void allow_descriptors(rlim_t count)
{
	struct rlimit limit;

	getrlimit(RLIMIT_NOFILE, &limit);
	if (limit.rlim_cur < count) {
		limit.rlim_cur = count < limit.rlim_max ? count : limit.rlim_max;
		setrlimit(RLIMIT_NOFILE, &limit);
	}
}

static void wait_for_end_of_input(struct pollfd *polls, int count)
{
	char ignored[256];

	polls[count] = (struct pollfd){ STDIN_FILENO, POLLIN, 0 };
	for (;;) {
		if (poll(polls, count + 1, -1) < 0 && errno != EINTR)
			die("poll: %s", strerror(errno));
		for (int i = 0; i < count; i++)
			if (polls[i].revents)
				die("an idle connection broke");
		if (polls[count].revents && read(STDIN_FILENO, ignored, sizeof ignored) <= 0)
			return;
	}
}

static void hold_idle(void)
{
	struct pollfd *polls = allocate((conf.idle + 1) * sizeof *polls);
	struct link *links = allocate(conf.idle * sizeof *links);
	uint64_t start = now();

	allow_descriptors(conf.idle + 16);
	for (int i = 0; i < conf.idle; i++) {
		links[i] = dial();
		negotiate(&links[i]);
		polls[i] = (struct pollfd){ links[i].fd, POLLIN, 0 };
	}
	printf("{\"idle\": %d, \"opened_in_s\": %.3f}\n", conf.idle, (now() - start) / 1e9);
	fflush(stdout);
	wait_for_end_of_input(polls, conf.idle);
	for (int i = 0; i < conf.idle; i++)
		disconnect(&links[i]);
}

/* Command line */

static void misused(const char *what) __attribute__((noreturn));
static void misused(const char *what)
{
	fprintf(stderr, "nbdload: %s; the head of nbdload.c lists the options\n", what);
	exit(2);
}

static uint64_t parse_number(const char *text, uint64_t least, uint64_t most, const char *what)
{
	char *end;
	unsigned long long value = strtoull(text, &end, 10);

	if (end == text || *end || value < least || value > most)
		misused(what);
	return value;
}

static uint64_t parse_seconds(const char *text)
{
	char *end;
	double value = strtod(text, &end);

	if (end == text || *end || !(value >= 0) || value > 86400)
		misused("bad number of seconds");
	return value * 1e9;
}

static void parse_op(const char *op)
{
	const char *plain = strncmp(op, "rand", 4) ? op : op + 4;

	if (strcmp(plain, "read") && strcmp(plain, "write"))
		misused("unknown --op");
	conf.op = op;
	conf.random = plain != op;
	conf.writing = !strcmp(plain, "write");
}

enum { OP = 256, BYTES, DEPTH, CONNECTIONS, SECONDS, WARMUP, SEED, SEPARATE, SPAN, ONCE, LIMIT, PENDING, FIRST, PAUSE, IDLE,
       EXPORT, EXPORT_NAME, TLS };

static const struct option options[] = {
	{ "op", 1, 0, OP },
	{ "bytes", 1, 0, BYTES },
	{ "depth", 1, 0, DEPTH },
	{ "connections", 1, 0, CONNECTIONS },
	{ "seconds", 1, 0, SECONDS },
	{ "warmup", 1, 0, WARMUP },
	{ "seed", 1, 0, SEED },
	{ "separate", 0, 0, SEPARATE },
	{ "span", 1, 0, SPAN },
	{ "once", 0, 0, ONCE },
	{ "limit", 1, 0, LIMIT },
	{ "pending", 1, 0, PENDING },
	{ "first", 1, 0, FIRST },
	{ "pause", 1, 0, PAUSE },
	{ "idle", 1, 0, IDLE },
	{ "export", 1, 0, EXPORT },
	{ "export-name", 0, 0, EXPORT_NAME },
	{ "tls", 1, 0, TLS },
	{ 0 },
};

static void parse_option(int option)
{
	switch (option) {
	case OP: parse_op(optarg); break;
	case BYTES: conf.bytes = parse_number(optarg, 1, MAX_BYTES, "bad --bytes"); break;
	case DEPTH: conf.depth = parse_number(optarg, 1, MAX_DEPTH, "bad --depth"); break;
	case CONNECTIONS: conf.connections = parse_number(optarg, 1, 10000, "bad --connections"); break;
	case SECONDS: conf.seconds = parse_seconds(optarg); break;
	case WARMUP: conf.warmup = parse_seconds(optarg); break;
	case SEED: conf.seed = parse_number(optarg, 0, UINT32_MAX, "bad --seed"); break;
	case SEPARATE: conf.separate = 1; break;
	case SPAN: conf.span = parse_number(optarg, 1, INT64_MAX, "bad --span"); break;
	case ONCE: conf.once = 1; break;
	case LIMIT: conf.limit = parse_number(optarg, 1, INT64_MAX, "bad --limit"); break;
	case PENDING: conf.pending = parse_number(optarg, 1, MAX_DEPTH, "bad --pending"); break;
	case FIRST: conf.first = parse_number(optarg, 1, 1000000, "bad --first"); break;
	case PAUSE: conf.pause = parse_seconds(optarg); break;
	case IDLE: conf.idle = parse_number(optarg, 1, 100000, "bad --idle"); break;
	case EXPORT: conf.export = optarg; break;
	case EXPORT_NAME: conf.export_name = 1; break;
	case TLS: conf.tls = optarg; break;
	default: misused("unknown option");
	}
}

int main(int argc, char **argv)
{
	int option;

	parse_op(conf.op);
	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1)
		parse_option(option);
	if (argc - optind < 1 || argc - optind > 2)
		misused("give HOST PORT or SOCKET_PATH");
	if (conf.limit && !conf.once)
		misused("--limit goes with --once");
	if (strlen(conf.export) > 4096)
		misused("export name too long");
	conf.host = argv[optind];
	conf.port = argv[optind + 1];
	if (conf.idle)
		hold_idle();
	else if (conf.first)
		measure_first_reads();
	else
		measure_load();
	return 0;
}
