"""NBD on the wire: constants, and messages packed and parsed without any I/O.

Nothing in this package opens, reads or writes a descriptor; what a message may
say and in which order lives here, who waits for it does not.
"""
