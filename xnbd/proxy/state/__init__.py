"""A proxy's bitmap on disk: its format, its files, how they are opened and made durable."""
