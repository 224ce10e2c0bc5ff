"""Origins that are block device images in Ceph (RBD), through Ceph's own Python binding."""
