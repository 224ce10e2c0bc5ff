"""The observer: the process that answers ``--metrics``. It reads what others share, and writes nothing."""
