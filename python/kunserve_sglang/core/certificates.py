"""Which flags about certificates belong together."""

from __future__ import annotations

from kunserve_sglang.core.errors import ConfigurationError


def check_certificates(
    certificate: str | None, key: str | None, password: str | None, authorities: str | None
) -> None:
    """Raises `ConfigurationError` unless these make a server with TLS, or one without."""
    if bool(certificate) != bool(key):
        raise ConfigurationError("--ssl-certfile and --ssl-keyfile: give both")
    if not certificate and (password or authorities):
        raise ConfigurationError(
            "--ssl-keyfile-password and --ssl-ca-certs need --ssl-certfile and --ssl-keyfile"
        )
