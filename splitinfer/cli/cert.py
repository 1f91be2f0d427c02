"""`splitinfer cert`: a certificate and a token, so that a node may listen beyond this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["EPILOG", "command"]

EPILOG = """
[bold]Examples[/bold]
  splitinfer cert                               into ./splitinfer-tls
  splitinfer cert -o tls --name node1 --name 192.168.1.20

Names are what clients dial; without --name it is this machine's.
"""


def command(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where cert.pem, key.pem and token go.")
    ] = Path("splitinfer-tls"),
    name: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="Name or address that clients dial; may be repeated."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long the certificate is valid.")] = 730,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a certificate that exists.")] = False,
) -> None:
    """Make a certificate for a node, and a token that nodes and clients share.

    The key and the token are readable by you alone. A token that exists is
    kept, so that several nodes can have one.
    """
    from splitinfer.transport.certificates import make_certificate

    made = make_certificate(out, names=name or (), days=days, replace=replace)
    token, fresh = keep_or_make_token(out / "token")
    print(f"certificate  {made.certificate}   for {', '.join(made.names)}, until {made.expires:%Y-%m-%d}")
    print(f"key          {made.key}")
    print(f"token        {token}   {'new' if fresh else 'kept'}; for every client and node, and nobody else")
    print(f"fingerprint  {made.fingerprint}")
    print()
    print("on the node:")
    print(
        f"  splitinfer node --host 0.0.0.0 --tls-cert {made.certificate} --tls-key {made.key}"
        f" --token-file {token}"
    )
    print("on the client:")
    print(f"  splitinfer chat --nodes HOST:7077 --token-file {token} --tls-fingerprint {made.fingerprint}")


def keep_or_make_token(file: Path) -> tuple[Path, bool]:
    """The token file at `file`, made if it is not there, and whether it was made. Raises UsageError for a bad
    one.
    """
    from splitinfer.transport.security import Token, load_token

    if file.exists():
        load_token(file)
        return file, False
    with os.fdopen(
        os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii"
    ) as stream:
        stream.write(Token.generate()[1] + "\n")
    return file, True
