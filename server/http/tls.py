"""What HTTPS needs: a certificate, and whose certificates clients may show."""

from __future__ import annotations

import ssl
from pathlib import Path

from posterior.errors import PosteriorError, first_line

VERIFY = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}


def context(
    certificate: Path,
    key: Path | None = None,
    password: str | None = None,
    authorities: Path | None = None,
    verify: str = "none",
    ciphers: str | None = None,
) -> ssl.SSLContext:
    """TLS for a server, from files in PEM; `verify`: whether clients show a certificate, one of VERIFY.

    Raises PosteriorError for what OpenSSL cannot read or use.
    """
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for path in (certificate, key, authorities):
        if path is not None and not path.is_file():
            raise PosteriorError(f"there is no file {path}; name a file in PEM")
    try:
        # without a password OpenSSL would ask for one on the terminal
        made.load_cert_chain(certificate, key, lambda: password or "")
    except (OSError, ValueError) as error:
        raise PosteriorError(
            f"the certificate {certificate} and its key cannot be used ({_reason(error)}); give a certificate and its "
            "own key in PEM, and the key's password in POSTERIOR_SSL_KEYFILE_PASSWORD if it has one"
        ) from error
    made.verify_mode = VERIFY[verify]
    try:
        if authorities is not None:
            made.load_verify_locations(authorities)
    except (OSError, ValueError) as error:
        raise PosteriorError(f"{authorities} holds no certificates in PEM ({_reason(error)})") from error
    try:
        if ciphers is not None:
            made.set_ciphers(ciphers)
    except ssl.SSLError as error:
        raise PosteriorError(f"OpenSSL knows no cipher of {ciphers!r}; `openssl ciphers` lists them") from error
    return made


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or "it is no PEM, or its password is wrong"
    return getattr(error, "strerror", None) or first_line(error)
