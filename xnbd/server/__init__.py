"""Processes and connections: the master, its workers, and one client's session."""
