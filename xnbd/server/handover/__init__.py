"""One process of a server hands its client to another one, and the client does not notice."""
