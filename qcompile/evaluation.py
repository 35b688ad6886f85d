"""Evaluation: what an artifact gets right, beside its float model, on data with and without labels."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qcompile.artifact import Artifact
from qcompile.calibration import Calibration, parse_calibration, split_options, whole_number
from qcompile.calibration_sources import text_inputs
from qcompile.capture import Captured
from qcompile.errors import Refused
from qcompile.generation.text import read_tokenizer
from qcompile.graph import Graph
from qcompile.perplexity import Windows, measure, read_windows
from qcompile.pipeline import sqnr_db

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})

Run = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Result:
    """A measured figure; ``float_value`` is the float model's, None where there is none."""

    task: str
    value: float
    unit: str
    samples: int
    float_value: float | None
    more: dict[str, float] = field(default_factory=dict)


def evaluate(artifact: Artifact, task: str, data: str | None, reference: Captured | None, limit: int | None = None) -> Result:
    """Measure one task.

    Args:
        artifact: the compiled model.
        task: ``sqnr`` and ``kl`` (any model, against its float model), ``top1`` (image folder with labels), ``sts`` (sentence pairs
            with scores), ``perplexity`` (language models).
        data: ``sqnr``/``kl``: calibration text; ``top1``: ``images:FOLDER?..&labels=FILE.csv``; ``sts``: a csv of score and two sentences;
            ``perplexity``: ``text:FILE?length=512&stride=512``.
        reference: the float model, where it is known.
        limit: the most samples.

    Raises:
        Refused: data that does not fit the task.
    """
    if task in ("sqnr", "kl"):
        return _compare(artifact, task, data, reference, limit)
    if data is None:
        raise Refused(f"task {task} needs data", way_out="give --data")
    if task == "perplexity":
        return _perplexity(artifact, data, reference, limit)
    return _top1(artifact, data, reference, limit) if task == "top1" else _sts(artifact, Path(data), reference, limit)


def check_data(task: str, data: str | None, model: Captured, limit: int | None = None) -> None:
    """Look at the data of a task before a model is compiled for it.

    Raises:
        Refused: it is missing, cannot be read, or does not fit the model.
    """
    if task in ("sqnr", "kl"):
        if data is not None:
            parse_calibration(data, example_inputs=model.example_inputs, tokenizer_folder=model.folder, limit=limit)
    elif data is None:
        raise Refused(f"task {task} needs data", way_out="give --data")
    elif task == "perplexity":
        _windows(data, model.graph, _tokenizer(None, model), limit)
    elif task == "sts":
        read_pairs(Path(data), limit)


def _float_run(reference: Captured | None) -> Run | None:
    return (lambda values: reference.graph(*values)) if reference else None


def _source(artifact: Artifact, data: str | None, reference: Captured | None, limit: int | None) -> Iterable[Sequence[torch.Tensor]]:
    if data is None:
        return [artifact.golden_inputs]
    folder = reference.folder if reference else None
    calibration: Calibration = parse_calibration(data, example_inputs=artifact.golden_inputs, tokenizer_folder=folder, limit=limit)
    return calibration.batches(artifact.graph)


def _compare(artifact: Artifact, task: str, data: str | None, reference: Captured | None, limit: int | None) -> Result:
    """Return SQNR in dB over all outputs, or the mean KL divergence in nats from the float model's softmax over the last axis."""
    run = _float_run(reference)
    if run is None:
        raise Refused(f"task {task} compares with the float model, which is not known on this machine", way_out="give --model MODEL")
    floats, outputs, samples = [], [], 0
    for batch in _source(artifact, data, reference, limit):
        floats.append(run(batch)[0])
        outputs.append(artifact.executable(batch)[0])
        samples += len(batch[0])
    if task == "sqnr":
        flat = (torch.cat([t.flatten() for t in side]) for side in (floats, outputs))
        return Result(task, sqnr_db(*flat), "dB", samples, None)
    kl = [
        torch.nn.functional.kl_div(o.double().log_softmax(-1), f.double().log_softmax(-1), log_target=True, reduction="none")
        .sum(-1)
        .flatten()
        for f, o in zip(floats, outputs, strict=True)
    ]
    agree = [(f.argmax(-1) == o.argmax(-1)).double().flatten() for f, o in zip(floats, outputs, strict=True)]
    return Result(task, float(torch.cat(kl).mean()), "nats", samples, None, {"top1_agreement": float(torch.cat(agree).mean())})


# ---- language models ------------------------------------------------------------------------------------------------------


def _perplexity(artifact: Artifact, data: str, reference: Captured | None, limit: int | None) -> Result:
    """Return the perplexity per token on ``text:FILE?length=512&stride=512``, see ``qcompile.perplexity``.

    ``kl`` and ``top1_agreement`` are to the float model, at the same places. Inputs beside the tokens are filled as for calibration.
    """
    windows = _windows(data, artifact.graph, _tokenizer(artifact.tokenizer, reference), limit)
    fill = text_inputs(artifact.graph)
    run = _float_run(reference)
    found = measure(
        lambda batch: artifact.executable(fill(batch[0])),
        (lambda batch: run(fill(batch[0]))) if run else None,
        windows,
        _vocabulary(artifact.graph),
    )
    nats = found.nats / found.tokens
    more: dict[str, float] = {"perplexity": found.perplexity, "tokens": found.tokens, "nats_per_token": nats}
    if (bits := artifact.report.get("bits_per_weight")) is not None:
        more["bits_per_weight"] = round(float(bits), 2)
    if run:
        more |= {"kl": found.divergence / found.tokens, "top1_agreement": found.agreed / found.tokens}
    return Result("perplexity", found.perplexity, "per token", found.tokens, found.float_perplexity if run else None, more)


def _windows(data: str, graph: Graph, tokenizer: Any, limit: int | None) -> Windows:
    """Return the windows that ``text:FILE?length=512&stride=512`` names."""
    head, options = split_options(data)
    place, unknown = Path(head.removeprefix("text:")), set(options) - {"length", "stride", "limit"}
    if not head.startswith("text:") or unknown:
        raise Refused(f"'{data}' is no text to judge", way_out="write text:FILE?length=512&stride=512&limit=100")
    context = whole_number(options.get("length", 512), "length")
    stride = whole_number(options.get("stride", context), "stride") if "stride" in options else None
    most = whole_number(options["limit"], "limit") if "limit" in options else limit
    longest = graph.symbols.ranges.get(str(graph.input_types[0].shape[-1]), (1, context))[1]
    if context > longest:
        raise Refused(f"the model takes texts of up to {longest} tokens, windows are {context}", way_out=f"give length={longest}")
    return read_windows(place, tokenizer, context, stride, most)


def _vocabulary(graph: Graph) -> int:
    size = graph.outputs[0].meta["val"].shape[-1] if graph.outputs[0].meta["val"].ndim else 1
    return size if isinstance(size, int) else 1 << 16


# ---- pictures -------------------------------------------------------------------------------------------------------------


def _top1(artifact: Artifact, data: str, reference: Captured | None, limit: int | None) -> Result:
    """Return the share of pictures, in percent, whose largest output is their label."""
    head, _, options = data.partition("?")
    parts = [part for part in options.split("&") if part]
    labels_file = next((part.removeprefix("labels=") for part in parts if part.startswith("labels=")), None)
    folder = Path(head.removeprefix("images:"))
    labels = _read_labels(Path(labels_file) if labels_file else folder / "labels.csv")
    rest = "&".join(part for part in parts if not part.startswith("labels="))
    source = parse_calibration(f"images:{folder}?{rest}", limit=limit or len(labels))
    expected = torch.tensor([_label(labels, path, folder) for path in source.files])  # type: ignore[attr-defined]
    run = _float_run(reference)
    right, float_right, seen = 0, 0, 0
    for batch in source.batches(artifact.graph):
        truth = expected[seen : seen + len(batch[0])]
        seen += len(truth)
        right += int((artifact.executable(batch)[0].argmax(-1) == truth).sum())
        float_right += int((run(batch)[0].argmax(-1) == truth).sum()) if run else 0
    return Result("top1", 100 * right / seen, "%", seen, 100 * float_right / seen if run else None)


def _read_labels(path: Path) -> dict[str, int]:
    """Read a csv with one column of picture files and one of whole numbers, the labels; a header is passed over."""
    if not path.is_file():
        raise Refused("there is no such label file", node=str(path), way_out="add labels=FILE.csv to the data text")
    labels: dict[str, int] = {}
    for row in csv.reader(path.read_text(encoding="utf-8").splitlines()):
        file = next((cell.strip() for cell in row if Path(cell.strip()).suffix.lower() in PICTURES), None)
        label = next((cell.strip() for cell in row if cell.strip().isdigit()), None)
        if file and label:
            labels |= {file: int(label), Path(file).name: int(label)}
    if not labels:
        raise Refused("the file holds no rows of a picture file and a label", node=str(path))
    return labels


def _label(labels: dict[str, int], path: Path, folder: Path) -> int:
    for name in (path.name, str(path.relative_to(folder)), path.stem):
        if name in labels:
            return labels[name]
    raise Refused("the picture has no label", node=str(path))


# ---- sentences ------------------------------------------------------------------------------------------------------------


def _sts(artifact: Artifact, path: Path, reference: Captured | None, limit: int | None) -> Result:
    """Return Spearman's correlation between cosine similarity of sentence embeddings and human scores.

    ``cosine`` is the mean similarity of the embeddings to the float model's.
    """
    from scipy.stats import spearmanr

    scores, first, second = read_pairs(path, limit)
    tokenize = _tokenizer(artifact.tokenizer, reference)
    embed = [embed_sentences(artifact.executable, artifact.graph, tokenize, side) for side in (first, second)]
    value = float(spearmanr(_cosine(*embed), scores).statistic)
    run = _float_run(reference)
    if run is None:
        return Result("sts", value, "Spearman", len(scores), None)
    exact = [embed_sentences(run, artifact.graph, tokenize, side) for side in (first, second)]
    agreement = torch.cat([_cosine(a, b) for a, b in zip(embed, exact, strict=True)])
    return Result(
        "sts",
        value,
        "Spearman",
        len(scores),
        float(spearmanr(_cosine(*exact), scores).statistic),
        {"cosine": float(agreement.mean()), "cosine_min": float(agreement.min())},
    )


def read_pairs(path: Path, limit: int | None = None) -> tuple[np.ndarray, list[str], list[str]]:
    """Read a csv of sentence pairs: one numeric column is the score, the two longest text columns the sentences."""
    if not path.is_file():
        raise Refused("there is no such file", node=str(path))
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if len(row) >= 3]
    if rows and not any(_number(cell) is not None for cell in rows[0]):
        rows = rows[1:]
    rows = rows[:limit]
    if not rows:
        raise Refused("the file holds no rows of a score and two sentences", node=str(path))
    width = len(rows[0])
    numeric = [c for c in range(width) if all(_number(row[c]) is not None for row in rows)]
    texts = sorted((c for c in range(width) if c not in numeric), key=lambda c: -sum(len(row[c]) for row in rows))[:2]
    if not numeric or len(texts) < 2:
        raise Refused("the rows do not hold a score and two sentences", node=str(path))
    a, b = sorted(texts)
    return np.array([float(row[numeric[-1]]) for row in rows]), [row[a] for row in rows], [row[b] for row in rows]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _tokenizer(data: bytes | None, reference: Captured | None) -> Any:
    if data is None and reference and reference.folder and (reference.folder / "tokenizer.json").is_file():
        data = (reference.folder / "tokenizer.json").read_bytes()
    if data is None:
        raise Refused("the artifact holds no tokenizer", way_out="compile from a Hugging Face folder with tokenizer.json")
    return read_tokenizer(data)


def embed_sentences(run: Run, graph: Graph, tokenizer: Any, sentences: Sequence[str], batch: int = 16) -> torch.Tensor:
    """Return unit embeddings [sentences, width]: the mean of the token vectors that the mask shows."""
    found: dict[int, torch.Tensor] = {}
    for index, ids, mask in _token_batches(tokenizer, sentences, batch, graph):
        inputs = [mask if "mask" in n.name else torch.zeros_like(ids) if "type" in n.name else ids for n in graph.inputs]
        output = run(inputs)[0]
        pooled = output if output.ndim == 2 else (output * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        found |= dict(zip(index, torch.nn.functional.normalize(pooled.double(), dim=-1), strict=True))
    return torch.stack([found[i] for i in range(len(sentences))])


def _token_batches(
    tokenizer: Any, sentences: Sequence[str], batch: int, graph: Graph
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Yield sentence numbers, tokens and mask, sentences of like length together."""
    tokenizer.no_padding()
    longest = min(
        (high for name, (_, high) in graph.symbols.ranges.items() if any(name in t.shape[1:] for t in graph.input_types)), default=512
    )
    tokenizer.enable_truncation(min(longest, 512))
    coded = [encoding.ids for encoding in tokenizer.encode_batch(list(sentences))]
    order = sorted(range(len(coded)), key=lambda i: len(coded[i]))
    for start in range(0, len(order), batch):
        index = order[start : start + batch]
        width = max(len(coded[i]) for i in index)
        ids = torch.tensor([coded[i] + [0] * (width - len(coded[i])) for i in index])
        mask = torch.tensor([[1] * len(coded[i]) + [0] * (width - len(coded[i])) for i in index])
        yield index, ids, mask


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(-1)
