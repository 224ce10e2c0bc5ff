"""One program of the wrapper becomes the next one, and clients do not notice."""
