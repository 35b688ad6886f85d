"""Native code inside an artifact, and the rule by which it is loaded.

A processor runs whatever a library holds, so digests are not enough: code is loaded where this user built it, recognised by an
HMAC-SHA256 under a random key of the user, or where the user says that the file is trusted. Neither helps code that was built for
another graph, processor or compiler: it would compute something else, or crash. What is not loaded is built again from the graph.

The key is 32 random bytes, readable by the user alone, in the user's configuration folder: removing the cache does not forget it.
It never leaves that file; a signature says nothing about it, nor about the user or the machine.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qcompile.graph import Graph
from qcompile.target import Executable, Target

KEY_BYTES = 32
SUBJECT = b"qcompile native code 1\n"  # the key signs nothing else, and no later form by accident

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NativeCode:
    """What one target built from a graph.

    Attributes:
        target: the target's name.
        key: what the code was built from and for: the graph's digest, and what the target says of this machine.
        files: content by file name, meaningful to the target alone.
        signature: 64 hex digits, or empty where no key could be kept.
    """

    target: str
    key: Mapping[str, str]
    files: Mapping[str, bytes]
    signature: str = ""

    def signed_by_user(self) -> bool:
        """Say whether this user's key signed exactly this code, for this key and target."""
        secret = _read_key(_key_file())
        return secret is not None and hmac.compare_digest(self._sign(secret).encode(), self.signature.encode())

    def load(self, target: Target, graph: Graph, *, threads: int | None, trust: bool) -> Executable | None:
        """Return the executable, or None where the code must not be loaded or cannot be; one line of the log then says why.

        Args:
            target: where the graph will run.
            graph: the artifact's own.
            threads: worker threads.
            trust: load code that somebody else signed, or nobody.
        """
        own = self.signed_by_user()
        reason = self._misfit(target, graph)
        if not reason and not (own or trust):
            reason = "this user did not build it on this machine (--trust-code, in Python trust_code=True, loads it)"
        if not reason:
            try:
                return target.load_native(graph, self.files, threads=threads, keep=own)
            except Exception as error:
                reason = f"loading it failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        logger.warning("the artifact's native code is not used: %s; the graph is built instead", reason)
        return None

    def _misfit(self, target: Target, graph: Graph) -> str:
        """Name what the code was built for and is not here; only names of this side, the file may say anything."""
        here = _fitting_key(target, graph)
        other = [name for name in here if self.key.get(name) != here[name]] or ["what else its key names"] * (set(self.key) != set(here))
        return f"it was built for another {', '.join(other)}" if other else ""

    def _sign(self, secret: bytes) -> str:
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}
        subject = json.dumps({"target": self.target, "key": dict(self.key), "files": digests}, sort_keys=True)
        return hmac.new(secret, SUBJECT + subject.encode(), hashlib.sha256).hexdigest()


def build_native_code(target: Target, graph: Graph) -> NativeCode:
    """Return a graph's code for this machine, signed with the user's key, which is made where there is none.

    Raises:
        Refused: the target has no native code, or cannot build it here.
    """
    code = NativeCode(target.name, _fitting_key(target, graph), target.native_code(graph))
    secret = _read_key(_key_file()) or _make_key(_key_file())
    if secret is None:
        logger.warning("no key can be kept in %s: the native code is not signed, and is only loaded with --trust-code", _key_file().parent)
        return code
    return NativeCode(code.target, code.key, code.files, code._sign(secret))


def _fitting_key(target: Target, graph: Graph) -> dict[str, str]:
    return {"graph": graph.digest, **target.native_key()}


def _key_file() -> Path:
    base = os.environ.get("QCOMPILE_CONFIG") or os.path.join(
        os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"), "qcompile"
    )
    return Path(base) / "native_code.key"


def _read_key(path: Path) -> bytes | None:
    """Return the key, or None where there is none that this user alone could have written and read."""
    try:
        # A link may lead to a file that others know; opening a pipe would wait for its writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            private = stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o077
            key = file.read(KEY_BYTES + 1) if private else b""
    except OSError:
        return None
    return key if len(key) == KEY_BYTES else None


def _make_key(path: Path) -> bytes | None:
    """Write a new key in the place of none or of one that others may know; return it, or None where it cannot be kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".key.")  # 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(KEY_BYTES))
            if os.path.lexists(path) and _read_key(path) is None:
                path.unlink()
            os.link(temporary, path)  # whole, and only where no other process was first
        except FileExistsError:
            pass
        finally:
            os.unlink(temporary)
    except OSError:
        return None
    return _read_key(path)
