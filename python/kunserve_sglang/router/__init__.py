"""Control plane: one process that proxies requests, watches the cluster and changes layouts."""
