"""Who a client is, and which disks it may open."""
