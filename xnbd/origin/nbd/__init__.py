"""Origins that speak NBD."""
