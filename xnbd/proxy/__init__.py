"""The caching proxy: a disk that lives elsewhere, kept here block by block."""
