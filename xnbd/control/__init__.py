"""The operator's protocol over a control socket: JSON lines, the server's side and the client's."""
