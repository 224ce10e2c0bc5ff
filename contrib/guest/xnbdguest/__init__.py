"""Small Linux virtual machines, without KVM and without installation, for the tests and for contrib/migration.

A guest is Debian's own kernel and a root file system in memory that is put together,
in a moment, from programs of this computer. It boots in a few seconds.
"""
