"""Many disks behind one port: negotiates with clients and gives each to a server process of its own."""
