"""The process that looks after a disk as a whole, and does what operators ask for."""
