"""TLS: credentials, contexts and channels, for clients of a server and for a proxy's origin.

Nothing outside this room imports ``ssl``, and nothing imports this room unless TLS is asked for.
"""
