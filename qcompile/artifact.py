"""The artifact: one file that holds a compiled model, checked before use and written whole or not at all.

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
import threading
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qcompile.capture.examples import table_rows
from qcompile.errors import Refused
from qcompile.files import atomic_file, remove_strays
from qcompile.graph import Graph, parse_graph, print_graph, tensor_digest
from qcompile.graph.file_tensor import CHUNK, FileTensor, TensorFile, read_if_small
from qcompile.graph.stored import check_stored
from qcompile.graph.text import DIGEST_LENGTH
from qcompile.kernel_tiles import KernelTiles, parse_tiles
from qcompile.native_code import NativeCode
from qcompile.registry import check_name, find_target
from qcompile.runtime import check_indices, check_inputs, to_output_kind
from qcompile.safetensors_file import Content, open_tensors
from qcompile.target import Executable

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


class Artifact:
    """A compiled model: save it, call it, look into it.

    Calling takes one array for each input, in order or by name, NumPy or torch, and returns the same kind: one array, or a tuple where the
    model has several outputs. It may be called from several threads.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        recipe: str,
        pipeline: str,
        target: str,
        golden_inputs: Sequence[torch.Tensor],
        golden_outputs: Sequence[torch.Tensor],
        report: Mapping[str, Any],
        versions: Mapping[str, str],
        tokenizer: bytes | None = None,
        end_tokens: Sequence[int] = (),
        native: NativeCode | None = None,
        tiles: KernelTiles | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.graph, self.target, self.recipe, self.pipeline = graph, target, recipe, pipeline
        self.golden_inputs, self.golden_outputs = list(golden_inputs), list(golden_outputs)
        self.report = dict(report)
        self.versions, self.tokenizer, self.native = dict(versions), tokenizer, native
        self.end_tokens = tuple(end_tokens)
        self.config = dict(config) if config else None
        self.tiles = tiles or KernelTiles()
        self.threads: int | None = None
        self.trust_code = False
        self._rows = [table_rows(graph, node) for node in graph.inputs]
        self._executable: Executable | None = None
        self._building = threading.Lock()

    # ---- running ----------------------------------------------------------------------------------------------------------

    @property
    def executable(self) -> Executable:
        """The built model, or the artifact's native code where it may be loaded; building is cached for the next process."""
        with self._building:  # threads that come first together build once
            if self._executable is None:
                target = find_target(self.target).with_tiles(self.tiles)
                if self.native and self.native.target == self.target:
                    self._executable = self.native.load(target, self.graph, threads=self.threads, trust=self.trust_code)
                if self._executable is None:
                    self._executable = target.build(self.graph, threads=self.threads)
        return self._executable

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors, kind = check_inputs(self.graph, args, kwargs)
        check_indices(self.graph, tensors, self._rows)
        outputs = [to_output_kind(output, kind) for output in self.executable(tensors)]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    # ---- writing ----------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> int:
        """Write the artifact and return its size in bytes; an older file stays whole until the new one is.

        Raises:
            Refused: the folder cannot be written.
        """
        path = Path(path)
        remove_strays(path)
        with atomic_file(path) as file:
            self._write(file)
        return path.stat().st_size

    def digest(self) -> str:
        """Return the SHA-256 of the bytes that ``save`` writes."""
        buffer = BytesIO()
        self._write(buffer)
        return hashlib.sha256(buffer.getvalue()).hexdigest()

    def move_constants(self, path: Path) -> None:
        """Read constants that lie in files from the artifact that was saved at ``path``, so that those files may go."""
        kept = {tensor_digest(t)[:DIGEST_LENGTH]: t for t in self.graph.tensors if isinstance(t, FileTensor)}
        if kept:
            found = _open_constants(path)
            for digest, tensor in kept.items():
                tensor.move_to(found[digest].file, found[digest].offset, found[digest].stored)

    def _members(self) -> dict[str, bytes | Content]:
        constants = {tensor_digest(t)[:DIGEST_LENGTH]: t for t in self.graph.tensors}
        golden = {f"input.{i}": t for i, t in enumerate(self.golden_inputs)}
        golden |= {f"output.{i}": t for i, t in enumerate(self.golden_outputs)}
        members: dict[str, bytes | Content] = {
            "graph.txt": print_graph(self.graph).encode(),
            "constants.safetensors": Content(constants),
            "golden.safetensors": Content(golden),
            "report.json": _json(self.report),
        }
        members |= {"tokenizer.json": self.tokenizer} if self.tokenizer else {}
        members |= {"config.json": _json(self.config)} if self.config else {}
        members |= {"tiles.json": self.tiles.to_json()} if self.tiles.machines else {}
        return members | (
            {f"code/{self.native.target}/{name}": data for name, data in sorted(self.native.files.items())} if self.native else {}
        )

    def manifest(self, members: Mapping[str, bytes | Content] | None = None) -> Manifest:
        """Return the manifest of these members, by default of those that ``save`` would write."""
        members = self._members() if members is None else members
        graph = self.graph
        entry = Entry(
            name="main",
            inputs=[Value(name=n.name, type=str(t)) for n, t in zip(graph.inputs, graph.input_types, strict=True)],
            outputs=[Value(name=name, type=graph.type_text(n)) for name, n in zip(graph.output_names, graph.outputs, strict=True)],
            symbols=graph.symbols.ranges,
        )
        return Manifest(
            format=FORMAT_VERSION, versions=self.versions, recipe=self.recipe, pipeline=self.pipeline, target=self.target, entries=[entry],
            members={name: Member(bytes=len(data), sha256=_sha256(_parts(data))) for name, data in members.items()},
            end_tokens=list(self.end_tokens),
            # As it was read: signing code that came from elsewhere would make it this user's.
            native=Native(target=code.target, key=dict(code.key), signature=code.signature) if (code := self.native) else None,
        )  # fmt: skip

    def _write(self, file: BinaryIO) -> None:
        members = self._members()
        manifest = _json(self.manifest(members).model_dump(exclude_none=True))
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, data in {"manifest.json": manifest, **members}.items():
                header = _aligned_header(name, archive.start_dir)
                header.file_size = len(data)
                with archive.open(header, "w") as member:
                    for part in _parts(data):
                        member.write(part)
            archive.comment = _comment(manifest)


def load(path: str | Path, *, target: str | None = None, threads: int | None = None, trust_code: bool = False) -> Artifact:
    """Read an artifact; every byte is checked against its digest before it is used.

    Native code in it runs only where this user built it on this machine; other code is built again from the graph.

    Args:
        path: the file.
        target: run on another target than the one it was compiled for, such as ``reference``.
        threads: worker threads, by default every core this process may use.
        trust_code: run the native code in the file whoever built it. It can do whatever you can: only for files whose origin you know.

    Raises:
        Refused: the file is missing, damaged, of another format version, or no artifact.
    """
    path = Path(path)
    members = read_members(path, leave=(CONSTANTS,))
    manifest = _parse_manifest(path, members.pop("manifest.json"))
    check_name("target", target or manifest.target)
    try:
        constants = {digest: read_if_small(tensor) for digest, tensor in _open_constants(path, manifest.members[CONSTANTS]).items()}
        golden = safetensors.torch.load(members["golden.safetensors"])
        report = json.loads(members["report.json"])
        config = json.loads(members.get("config.json", b"null"))
        graph = parse_graph(members["graph.txt"].decode(), constants)
        check_stored(graph)
    except Refused:
        raise
    except Exception as error:
        raise Refused(
            f"a member is not what its name says: {type(error).__name__}: {' '.join(str(error).split())[:200]}", node=str(path)
        ) from error
    artifact = Artifact(
        graph, recipe=manifest.recipe, pipeline=manifest.pipeline, target=target or manifest.target,
        golden_inputs=_numbered(golden, "input"), golden_outputs=_numbered(golden, "output"), report=report,
        versions=manifest.versions, tokenizer=members.get("tokenizer.json"), end_tokens=manifest.end_tokens,
        native=_native_code(path, manifest, members),
        tiles=parse_tiles(members.get("tiles.json", b"{}"), f"{path}: tiles.json"), config=config if isinstance(config, dict) else None,
    )  # fmt: skip
    artifact.threads, artifact.trust_code = threads, trust_code
    return artifact


def _native_code(path: Path, manifest: Manifest, members: Mapping[str, bytes]) -> NativeCode | None:
    """Return the members under ``code/``, not yet trusted.

    Raises:
        Refused: they are not of the manifest's target, or named as no file should be.
    """
    folder = f"code/{manifest.native.target}/" if manifest.native else "code/"
    names = [name for name in members if name.startswith("code/")]
    if bool(names) != bool(manifest.native) or any(not n.startswith(folder) or not FILE_NAME.fullmatch(n[len(folder) :]) for n in names):
        raise Refused("the native code is not what the manifest says of it", node=str(path))
    if manifest.native is None:
        return None
    files = {name.removeprefix(folder): members[name] for name in names}
    return NativeCode(manifest.native.target, manifest.native.key, files, manifest.native.signature)


def _open_constants(path: Path, checked: Member | None = None) -> dict[str, FileTensor]:
    """Return the constants of an artifact by digest, where they lie in the file, which stays open.

    Raises:
        Refused: the bytes are not those of the member that the manifest declares.
    """
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(CONSTANTS)
    file = TensorFile.of(path, hold=True)
    start = info.header_offset + 30 + len(info.filename.encode()) + len(info.extra)
    if checked is not None:
        parts = (file.read(start + at, min(CHUNK, info.file_size - at)) for at in range(0, info.file_size, CHUNK))
        if info.file_size != checked.bytes or _sha256(parts) != checked.sha256:
            raise _damaged(path, CONSTANTS)
    return open_tensors(file, start, info.file_size)


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
            if archive.comment != _comment(manifest):
                raise Refused("the manifest is damaged: its digest is not the one in the file's comment", node=str(path))
            return {"manifest.json": manifest} | _read_checked(path, archive, _parse_manifest(path, manifest), leave)
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
            raise _damaged(path, name)
    return data


def _damaged(path: Path, name: str) -> Refused:
    return Refused(
        f"{name} is damaged: its digest is not the one in the manifest", node=str(path), way_out="compile or copy the artifact again"
    )


def _parts(data: bytes | Content) -> Iterable[bytes | memoryview]:
    return data.parts() if isinstance(data, Content) else (data,)


def _sha256(parts: Iterable[bytes | bytearray | memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _parse_manifest(path: Path, data: bytes) -> Manifest:
    try:
        manifest = Manifest.model_validate(json.loads(data), strict=False)
    except (ValidationError, ValueError, RecursionError) as error:
        raise Refused("the manifest is damaged: it is not understood", node=str(path)) from error
    if manifest.format != FORMAT_VERSION:
        raise Refused(f"the manifest has format {manifest.format}, this is qcompile for format {FORMAT_VERSION}", node=str(path))
    return manifest


def _comment(manifest: bytes) -> bytes:
    return f"{MAGIC} {FORMAT_VERSION} {hashlib.sha256(manifest).hexdigest()}".encode()


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _aligned_header(name: str, offset: int) -> zipfile.ZipInfo:
    """Return a member header of fixed time whose extra field pads the data to ALIGNMENT."""
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.external_attr = 0o644 << 16
    data_start = offset + 30 + len(name) + 4  # local header, name, and the extra field's own head
    info.extra = struct.pack("<HH", 0x5143, -data_start % ALIGNMENT) + bytes(-data_start % ALIGNMENT)
    return info


def _numbered(tensors: Mapping[str, torch.Tensor], word: str) -> list[torch.Tensor]:
    return [tensors[f"{word}.{i}"] for i in range(sum(name.startswith(f"{word}.") for name in tensors))]
