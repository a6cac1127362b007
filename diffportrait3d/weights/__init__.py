"""Every way to read and write a file of weights."""
