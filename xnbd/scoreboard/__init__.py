"""Memory that all processes of a disk share."""
