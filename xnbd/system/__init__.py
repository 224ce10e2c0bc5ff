"""What the operating system offers: processes, sockets, locks on files."""
