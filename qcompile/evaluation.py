"""Evaluation: what an artifact gets right, beside its float model, on data with and without labels."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qcompile.artifact import Artifact
from qcompile.calibration import Calibration, parse_calibration
from qcompile.capture import Captured
from qcompile.errors import Refused
from qcompile.graph import Graph
from qcompile.pipeline import sqnr_db

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})

_ALL = 1 << 30  # windows: more than any text has

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
            ``perplexity``: ``text:FILE?length=512``.
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
    """Return the perplexity per token: exp of the mean negative log likelihood, in nats, of every token but the first of its window.

    The text is cut into windows of ``length`` tokens that do not overlap, so a token sees only what stands before it in its window; what
    is left at the end and fills no window is not judged. ``kl`` and ``top1_agreement`` are to the float model, at the same places.
    """
    options = data.partition("?")[2]
    defaults = {"length": 512, "split": "chunks", "limit": limit or _ALL}
    given = [f"{key}={value}" for key, value in defaults.items() if f"{key}=" not in options]
    data = "&".join([data if options else f"{data}?", *given]).replace("?&", "?")
    run, graph = _float_run(reference), artifact.graph
    place = next((i for i, node in enumerate(graph.inputs) if not any(word in node.name for word in ("mask", "position", "type"))), 0)
    found, exact, divergence, agreed, tokens = 0.0, 0.0, 0.0, 0, 0
    for batch in _source(artifact, data, reference, limit):
        following = batch[place][:, 1:].long().unsqueeze(-1)
        likely = _log_probabilities(artifact.executable(batch)[0], batch[place])
        found -= float(likely.gather(-1, following).sum())
        tokens += following.numel()
        if run:
            true = _log_probabilities(run(batch)[0], batch[place])
            exact -= float(true.gather(-1, following).sum())
            divergence += float((true.exp() * (true - likely)).sum())
            agreed += int((true.argmax(-1) == likely.argmax(-1)).sum())
    if not tokens:
        raise Refused("the text fills no window", node=data, way_out="give a longer text or a smaller length")
    more = {"kl": divergence / tokens, "top1_agreement": agreed / tokens} if run else {}
    return Result("perplexity", math.exp(found / tokens), "per token", tokens, math.exp(exact / tokens) if run else None, more)


def _log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return log softmax [batch, tokens - 1, vocabulary] in float64: what is said of the next token at every place but the last."""
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        shape = list(logits.shape)
        raise Refused(f"perplexity needs logits [batch, tokens, vocabulary] for tokens {list(tokens.shape)}; the model's output is {shape}")
    if int(tokens.max()) >= logits.shape[-1]:
        raise Refused(
            f"the model gives {logits.shape[-1]} values for each token, and the text has token {int(tokens.max())}: no language model"
        )
    return logits[:, :-1].double().log_softmax(-1)


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
    tokenize = _tokenizer(artifact, reference)
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


def _tokenizer(artifact: Artifact, reference: Captured | None) -> Any:
    from tokenizers import Tokenizer

    data = artifact.tokenizer
    if data is None and reference and reference.folder and (reference.folder / "tokenizer.json").is_file():
        data = (reference.folder / "tokenizer.json").read_bytes()
    if data is None:
        raise Refused("the artifact holds no tokenizer", way_out="compile from a Hugging Face folder with tokenizer.json")
    return Tokenizer.from_str(data.decode())


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
