"""Command lines: one module per program, whose docstring is its usage text."""
