"""Where the key comes from: a key file, a password at the terminal, in a file, or in the environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pyface.errors import UserError
from pyface.vault.keys import Secret, read_key_file

PASSWORD_VARIABLE = "PYFACE_PASSWORD"
MIN_PASSWORD_LENGTH = 8

KeyFile = Annotated[
    Path | None, typer.Option("--key-file", help="File with a key: 32 raw bytes, or 64 hexadecimal digits.")
]
Password = Annotated[
    bool, typer.Option("--password", help=f"Ask for a password (or take it from {PASSWORD_VARIABLE}, if set).")
]
PasswordFile = Annotated[
    Path | None, typer.Option("--password-file", help="File whose first line is the password, for scripts.")
]


def choose_secret(key_file: Path | None, password: bool, password_file: Path | None, *, new: bool) -> Secret:
    """The one secret the options name; without any, the password in the environment.

    Args:
        new: it is going to protect something: a typed password is asked for twice and must not be short.
    """
    given = [option for option in (key_file, password, password_file) if option]
    if len(given) > 1:
        raise UserError("give one of --key-file, --password and --password-file, not several")
    if key_file:
        return read_key_file(key_file)
    if password_file:
        text = _first_line(password_file)
    elif PASSWORD_VARIABLE in os.environ:
        text = os.environ[PASSWORD_VARIABLE]
    elif password:
        text = _ask(new)
    else:
        hint = "make one with --new-key-file FILE, " if new else ""
        raise UserError(f"no key: {hint}give --key-file FILE, or use --password")
    if new and len(text) < MIN_PASSWORD_LENGTH:
        raise UserError(
            f"the password has {len(text)} characters; use at least {MIN_PASSWORD_LENGTH}, "
            f"because whoever guesses it sees the faces"
        )
    return Secret.from_password(text)


def _first_line(path: Path) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline(4096).rstrip("\r\n")
    except UnicodeDecodeError:
        raise UserError(f"password file {path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"cannot read password file {path}: {error.strerror or error}") from error


def _ask(new: bool) -> str:
    if not sys.stdin.isatty():
        raise UserError(
            f"--password needs a terminal to ask at; in a script use --password-file FILE or set {PASSWORD_VARIABLE}"
        )
    return typer.prompt("Password", hide_input=True, confirmation_prompt=new, err=True)
