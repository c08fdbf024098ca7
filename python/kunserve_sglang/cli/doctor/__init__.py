"""`kunserve doctor`: what is installed on this host, and what would keep it from serving."""
