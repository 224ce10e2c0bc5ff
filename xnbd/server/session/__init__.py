"""One client: from its handshake to its last reply."""
