"""TLS towards clients."""

from __future__ import annotations

import ssl

from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.errors import ConfigurationError


def server_context(config: ClusterConfig) -> ssl.SSLContext | None:
    """None for a router that serves plain HTTP; with `ssl_ca_certs`, clients need a certificate.

    Raises `ConfigurationError` if the files cannot be used.
    """
    if not config.ssl_certfile:
        return None
    password = config.ssl_keyfile_password or ""  # without one, OpenSSL would ask at the terminal
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=config.ssl_ca_certs)
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password)
    except OSError as error:  # `SSLError` is one, too
        reason = error.strerror or error
        raise ConfigurationError(
            f"--ssl-certfile, --ssl-keyfile, --ssl-ca-certs: {reason}"
        ) from error
    if config.ssl_ca_certs:
        context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["http/1.1"])
    return context
