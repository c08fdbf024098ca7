"""HTTP/1.1 with clients and with instances."""
