"""Numbers for monitoring: how they are written, and served over HTTP."""
