"""The artifact: a compiled model that is called, saved and looked into. ``qcompile.artifact_file`` has the form of its file."""

from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

from qcompile.artifact_file import (
    CONSTANTS,
    FILE_NAME,
    FORMAT_VERSION,
    Entry,
    Manifest,
    Member,
    Native,
    Value,
    aligned_header,
    damaged,
    file_comment,
    parse_manifest,
    read_members,
)
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
                header = aligned_header(name, archive.start_dir)
                header.file_size = len(data)
                with archive.open(header, "w") as member:
                    for part in _parts(data):
                        member.write(part)
            archive.comment = file_comment(manifest)


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
    manifest = parse_manifest(path, members.pop("manifest.json"))
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
            raise damaged(path, CONSTANTS)
    return open_tensors(file, start, info.file_size)


def _parts(data: bytes | Content) -> Iterable[bytes | memoryview]:
    return data.parts() if isinstance(data, Content) else (data,)


def _sha256(parts: Iterable[bytes | bytearray | memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _numbered(tensors: Mapping[str, torch.Tensor], word: str) -> list[torch.Tensor]:
    return [tensors[f"{word}.{i}"] for i in range(sum(name.startswith(f"{word}.") for name in tensors))]
