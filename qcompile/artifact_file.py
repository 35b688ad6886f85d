"""The file of an artifact: it holds a compiled model, checked before use and written whole or not at all.

``model.qc`` is a zip of stored members, each aligned to 64 bytes so that it can be mapped. Its comment is ``qcompile 1`` and the SHA-256 of
``manifest.json``; the manifest holds size and SHA-256 of every other member. There is no pickle and no Python in it, and no native code
unless it was asked for; ``qcompile.native_code`` says when that is loaded.

| member | content |
| --- | --- |
| manifest.json | format version, versions, recipe, target, entries, digests of members, key and signature of native code |
| graph.txt | the integer-stage graph, see ``qcompile.graph.text`` |
| constants.safetensors | every constant once, named by the first 16 hex digits of its digest |
| golden.safetensors | sample inputs and the reference's outputs |
| report.json | layers with schemes and errors, float operators with reasons, probe digests |
| tokenizer.json | the model's tokenizer, where it has one |
| config.json | its Hugging Face configuration, where it has one: what other tools need beside the weights |
| tiles.json | block sizes of kernels where ``qcompile tune`` put them, see ``qcompile.kernel_tiles`` |
| code/<target>/<name> | what the target built from the graph, only where it was asked for |
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zipfile
from collections.abc import Collection
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qcompile.errors import Refused

FORMAT_VERSION = 1
ALIGNMENT = 64
MAGIC = "qcompile"
LARGEST_HEADER = 16 << 20  # manifest, report and graph text: no honest one comes near
CONSTANTS = "constants.safetensors"
LARGE = (CONSTANTS, "golden.safetensors", "code/")  # members, and a folder, that may be larger
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


class Value(BaseModel):
    """Name and type of an input or output of an entry."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    type: str


class Entry(BaseModel):
    """A callable function of the artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    inputs: list[Value]
    outputs: list[Value]
    symbols: dict[str, tuple[int, int]]


class Member(BaseModel):
    """Size and digest of one member."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bytes: int
    sha256: str


class Native(BaseModel):
    """Who built the members under ``code/``, and what for; see ``NativeCode``."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    target: str
    key: dict[str, str]
    signature: str = Field(pattern="^([0-9a-f]{64})?$")


class Manifest(BaseModel):
    """What the file says of itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int
    versions: dict[str, str]
    recipe: str
    pipeline: str
    target: str
    entries: list[Entry]
    members: dict[str, Member]
    end_tokens: list[int] = []
    native: Native | None = None


def read_members(path: Path, *, leave: Collection[str] = ()) -> dict[str, bytes]:
    """Return all members of an artifact but those in ``leave``, after checking sizes, digests and that there is nothing else in the file.

    Raises:
        Refused: naming what is wrong.
    """
    if not path.is_file():
        raise Refused("there is no such file", node=str(path))
    try:
        with zipfile.ZipFile(path) as archive:
            _check_archive(path, archive)
            manifest = archive.read("manifest.json")
            if archive.comment != file_comment(manifest):
                raise Refused("the manifest is damaged: its digest is not the one in the file's comment", node=str(path))
            return {"manifest.json": manifest} | _read_checked(path, archive, parse_manifest(path, manifest), leave)
    except (
        zipfile.BadZipFile,
        KeyError,
        EOFError,
        OSError,
        struct.error,
        UnicodeDecodeError,
        NotImplementedError,
        RuntimeError,
        ValueError,
    ) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"no qcompile artifact, or a damaged one: {' '.join(str(error).split())}", node=str(path)) from error


def _check_archive(path: Path, archive: zipfile.ZipFile) -> None:
    infos = archive.infolist()
    if not archive.comment.startswith(MAGIC.encode() + b" "):
        raise Refused("no qcompile artifact", node=str(path))
    version = archive.comment.split(b" ")[1]
    if version != str(FORMAT_VERSION).encode():
        raise Refused(
            f"the artifact has format {version.decode(errors='replace')}, this is qcompile for format {FORMAT_VERSION}", node=str(path)
        )
    names = [info.filename for info in infos]
    size = path.stat().st_size
    start = 0
    for info in infos:
        if info.header_offset != start:
            raise Refused("the file holds something beside the members of an artifact", node=str(path))
        start += 30 + len(info.filename.encode()) + len(info.extra) + info.file_size
    if len(set(names)) != len(names) or any(info.compress_type != zipfile.ZIP_STORED or info.file_size > size for info in infos):
        raise Refused("the artifact holds a member twice, compressed, or larger than the file", node=str(path))
    if start != archive.start_dir:
        raise Refused("the file holds something beside the members of an artifact", node=str(path))
    if names[:1] != ["manifest.json"] or infos[0].file_size > LARGEST_HEADER:
        raise Refused(f"the manifest is not the first member, or larger than {LARGEST_HEADER} bytes", node=str(path))


def _read_checked(path: Path, archive: zipfile.ZipFile, manifest: Manifest, leave: Collection[str]) -> dict[str, bytes]:
    found = {info.filename: info.file_size for info in archive.infolist()} | {"manifest.json": 0}
    if set(found) - {"manifest.json"} != set(manifest.members):
        odd = sorted(set(found) ^ set(manifest.members) - {"manifest.json"})
        raise Refused(f"the manifest and the file do not hold the same members: {', '.join(odd)}", node=str(path))
    data = {}
    for name, member in manifest.members.items():
        if not name.startswith(LARGE) and found[name] > LARGEST_HEADER:
            raise Refused(f"{name} is larger than {LARGEST_HEADER} bytes", node=str(path))
        if name in leave:
            continue
        data[name] = archive.read(name)
        if len(data[name]) != member.bytes or hashlib.sha256(data[name]).hexdigest() != member.sha256:
            raise damaged(path, name)
    return data


def damaged(path: Path, name: str) -> Refused:
    """Return the refusal of a member whose bytes are not those of its digest."""
    return Refused(
        f"{name} is damaged: its digest is not the one in the manifest", node=str(path), way_out="compile or copy the artifact again"
    )


def parse_manifest(path: Path, data: bytes) -> Manifest:
    """Return what the manifest says; ``path`` is named where it is damaged or of another format."""
    try:
        manifest = Manifest.model_validate(json.loads(data), strict=False)
    except (ValidationError, ValueError, RecursionError) as error:
        raise Refused("the manifest is damaged: it is not understood", node=str(path)) from error
    if manifest.format != FORMAT_VERSION:
        raise Refused(f"the manifest has format {manifest.format}, this is qcompile for format {FORMAT_VERSION}", node=str(path))
    return manifest


def file_comment(manifest: bytes) -> bytes:
    """Return the comment of a file with this manifest."""
    return f"{MAGIC} {FORMAT_VERSION} {hashlib.sha256(manifest).hexdigest()}".encode()


def aligned_header(name: str, offset: int) -> zipfile.ZipInfo:
    """Return a member header of fixed time whose extra field pads the data to ALIGNMENT."""
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.external_attr = 0o644 << 16
    data_start = offset + 30 + len(name) + 4  # local header, name, and the extra field's own head
    info.extra = struct.pack("<HH", 0x5143, -data_start % ALIGNMENT) + bytes(-data_start % ALIGNMENT)
    return info
