/* See nbdload_tls.h. */
#include "nbdload_tls.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#ifndef WITH_TLS

struct tls *tls_start(int fd, const char *directory, const char *host, const char **why)
{
	(void)fd, (void)directory, (void)host;
	*why = "nbdload was compiled without TLS: apt-get install libssl-dev, then compile it again";
	return NULL;
}

ssize_t tls_receive(struct tls *tls, void *to, size_t length)
{
	(void)tls, (void)to, (void)length;
	return -1;
}

int tls_send(struct tls *tls, const void *from, size_t length)
{
	(void)tls, (void)from, (void)length;
	return -1;
}

int tls_flush(struct tls *tls)
{
	(void)tls;
	return -1;
}

void tls_end(struct tls *tls)
{
	(void)tls;
}

#else

#include <openssl/err.h>
#include <openssl/ssl.h>
#include <pthread.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define OUT_ROOM (256 << 10) /* bytes of records that leave in one send() */
#define IN_ROOM (256 << 10)  /* bytes of records that one recv() takes */

struct tls {
	SSL *ssl;
	int fd;
	int patient; /* whether recv() may wait */
	size_t held; /* bytes in out */
	char out[OUT_ROOM];
};

/* The socket as OpenSSL sees it: writes are held until a flush, reads wait only if there is nothing at all. */

static int send_held(struct tls *tls)
{
	size_t sent = 0;

	while (sent < tls->held) {
		ssize_t n = send(tls->fd, tls->out + sent, tls->held - sent, MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -1;
		sent += n;
	}
	tls->held = 0;
	return 0;
}

static int bio_write(BIO *bio, const char *from, int length)
{
	struct tls *tls = BIO_get_data(bio);
	int done = 0;

	while (done < length) {
		size_t part = length - done;

		if (tls->held == OUT_ROOM && send_held(tls))
			return -1;
		if (part > OUT_ROOM - tls->held)
			part = OUT_ROOM - tls->held;
		memcpy(tls->out + tls->held, from + done, part);
		tls->held += part;
		done += part;
	}
	return length;
}

static int bio_read(BIO *bio, char *to, int length)
{
	struct tls *tls = BIO_get_data(bio);
	ssize_t n;

	BIO_clear_retry_flags(bio);
	do
		n = recv(tls->fd, to, length, tls->patient ? 0 : MSG_DONTWAIT);
	while (n < 0 && errno == EINTR);
	if (n < 0 && errno == EAGAIN && !tls->patient)
		BIO_set_retry_read(bio);
	return n;
}

static long bio_control(BIO *bio, int command, long number, void *pointer)
{
	(void)number, (void)pointer;
	if (command == BIO_CTRL_FLUSH)
		return send_held(BIO_get_data(bio)) ? -1 : 1;
	return 0;
}

static SSL_CTX *context;
static BIO_METHOD *method;
static const char *context_error;

static const char *prepare(const char *directory)
{
	char ca[4096], certificate[4096], key[4096];

	snprintf(ca, sizeof ca, "%s/ca-cert.pem", directory);
	snprintf(certificate, sizeof certificate, "%s/client-cert.pem", directory);
	snprintf(key, sizeof key, "%s/client-key.pem", directory);
	method = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "socket");
	context = SSL_CTX_new(TLS_client_method());
	if (!method || !context)
		return "out of memory";
	BIO_meth_set_write(method, bio_write);
	BIO_meth_set_read(method, bio_read);
	BIO_meth_set_ctrl(method, bio_control);
	SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION);
	SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
	SSL_CTX_set_mode(context, SSL_MODE_RELEASE_BUFFERS);
	SSL_CTX_set_read_ahead(context, 1);
	SSL_CTX_set_default_read_buffer_len(context, IN_ROOM);
	SSL_CTX_set_verify(context, SSL_VERIFY_PEER, NULL);
	if (SSL_CTX_load_verify_locations(context, ca, NULL) != 1)
		return "no usable ca-cert.pem in the directory of --tls";
	if (!access(certificate, F_OK)
	    && (SSL_CTX_use_certificate_chain_file(context, certificate) != 1
	        || SSL_CTX_use_PrivateKey_file(context, key, SSL_FILETYPE_PEM) != 1))
		return "client-cert.pem and client-key.pem in the directory of --tls are not usable";
	return NULL;
}

/* Why the last call on the session failed: what the server's certificate lacks, or what OpenSSL says. */
static const char *reason(SSL *ssl)
{
	const char *words = ERR_reason_error_string(ERR_peek_last_error());
	long verdict = SSL_get_verify_result(ssl);

	if (verdict != X509_V_OK)
		return X509_verify_cert_error_string(verdict);
	return words ? words : "the server closed the connection";
}

static struct tls *make(int fd, const char *host)
{
	struct tls *tls = calloc(1, sizeof *tls);
	BIO *bio = BIO_new(method);

	if (!tls || !bio || !(tls->ssl = SSL_new(context)))
		abort();
	tls->fd = fd;
	tls->patient = 1;
	BIO_set_data(bio, tls);
	BIO_set_init(bio, 1);
	SSL_set_bio(tls->ssl, bio, bio);
	if (host) {
		SSL_set_tlsext_host_name(tls->ssl, host);
		SSL_set1_host(tls->ssl, host);
	}
	return tls;
}

struct tls *tls_start(int fd, const char *directory, const char *host, const char **why)
{
	static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
	struct tls *tls;

	pthread_mutex_lock(&once);
	if (!context)
		context_error = prepare(directory);
	pthread_mutex_unlock(&once);
	*why = context_error;
	if (context_error)
		return NULL;
	tls = make(fd, host);
	if (SSL_connect(tls->ssl) == 1)
		return tls;
	*why = reason(tls->ssl);
	return NULL;
}

static ssize_t end_or_error(SSL *ssl, int result)
{
	int kind = SSL_get_error(ssl, result);

	if (kind == SSL_ERROR_ZERO_RETURN)
		return 0;
	if (kind == SSL_ERROR_SSL)
		errno = EPROTO; /* else it is recv()'s */
	return -1;
}

ssize_t tls_receive(struct tls *tls, void *to, size_t length)
{
	size_t have = 0;
	int n;

	do {
		tls->patient = !have;
		ERR_clear_error();
		n = SSL_read(tls->ssl, (char *)to + have, length - have);
		if (n <= 0)
			return have ? (ssize_t)have : end_or_error(tls->ssl, n); /* either is met again by the next call */
		have += n;
	} while (have < length && SSL_has_pending(tls->ssl));
	return have;
}

int tls_send(struct tls *tls, const void *from, size_t length)
{
	return !length || SSL_write(tls->ssl, from, length) == (int)length ? 0 : -1;
}

int tls_flush(struct tls *tls)
{
	return send_held(tls);
}

void tls_end(struct tls *tls)
{
	SSL_shutdown(tls->ssl);
	send_held(tls);
	SSL_free(tls->ssl);
	free(tls);
}

#endif
