"""The client side: the remote disk that a proxy copies from. It is read, never written."""
