/*
 * TLS for nbdload, with OpenSSL: compiled in with -DWITH_TLS -lssl -lcrypto
 * (Debian: libssl-dev). What leaves together leaves in one send(), as much as
 * the window allows; what has come is received at once and decrypted record by
 * record. No session is resumed, no handshake repeated.
 */
#ifndef NBDLOAD_TLS_H
#define NBDLOAD_TLS_H

#include <stddef.h>
#include <sys/types.h>

struct tls;

/*
 * A TLS session on the connected socket fd, after its handshake. The server's
 * certificate must be signed by directory/ca-cert.pem and be for host (NULL: for
 * anybody); directory/client-cert.pem and client-key.pem are ours, if they are
 * there. On failure NULL, and *why says it.
 */
struct tls *tls_start(int fd, const char *directory, const char *host, const char **why);

/*
 * As recv(2): at least one byte unless the peer has gone, and all that has come if
 * there is room. -1 with errno EAGAIN: nothing came before the socket's time limit.
 */
ssize_t tls_receive(struct tls *tls, void *to, size_t length);

/* All of it, or -1. It leaves with tls_flush(), or before if it is much. */
int tls_send(struct tls *tls, const void *from, size_t length);
int tls_flush(struct tls *tls);

/* Say goodbye; the socket stays open. */
void tls_end(struct tls *tls);

#endif
