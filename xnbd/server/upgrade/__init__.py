"""One program of the master becomes the next one, and clients do not notice."""
