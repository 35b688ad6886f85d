"""Evaluation against figures worked out by other means."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

import qcompile
from qcompile import Artifact, Refused
from qcompile.capture import Captured, capture
from qcompile.evaluation import _read_labels, embed_sentences, evaluate, read_pairs

# ---- against the float model ----------------------------------------------------------------------------------------------


@pytest.fixture
def reference(tiny: Any) -> Captured:
    return capture(*tiny.mlp())


def test_sqnr_and_kl_over_all_batches(tiny_artifact: Callable[..., Artifact], reference: Captured, tmp_path: Path) -> None:
    artifact, x = tiny_artifact("mlp"), np.random.default_rng(0).standard_normal((21, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    data = f"{tmp_path / 'x.npy'}?batch=4"
    exact, found = reference.graph(torch.from_numpy(x))[0].double(), artifact(torch.from_numpy(x)).double()
    result = evaluate(artifact, "sqnr", data, reference)
    assert (result.unit, result.samples, result.float_value) == ("dB", 21, None)
    assert result.value == pytest.approx(float(10 * torch.log10(exact.square().sum() / (exact - found).square().sum())), rel=1e-4)
    result = evaluate(artifact, "kl", data, reference)
    p, q = exact.softmax(-1), found.softmax(-1)
    assert result.value == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert result.more["top1_agreement"] == pytest.approx(float((exact.argmax(-1) == found.argmax(-1)).double().mean()))


def test_the_float_model_is_equal_to_itself(tiny_artifact: Callable[..., Artifact], reference: Captured) -> None:
    result = evaluate(tiny_artifact("mlp", "float"), "kl", None, reference)
    assert result.value == pytest.approx(0, abs=1e-12)
    assert result.more["top1_agreement"] == 1
    assert evaluate(tiny_artifact("mlp", "float"), "sqnr", None, reference).value > 120


# ---- language models ------------------------------------------------------------------------------------------------------


class NextWord(torch.nn.Module):
    """Gives the logits of the next of ten words by the last two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table, self.head = torch.nn.Embedding(10, 8), torch.nn.Linear(8, 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        vectors = self.table(ids)
        return self.head(torch.nn.functional.relu(vectors + 0.5 * vectors.roll(1, 1)))


@pytest.fixture
def words(tmp_path: Path) -> tuple[Path, list[int]]:
    """Return the folder of a text and its tokenizer, and the text's tokens: 4 windows of 7, and 3 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({str(i): i for i in range(10)}, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    ids = np.random.default_rng(0).integers(0, 10, 31).tolist()
    (tmp_path / "text.txt").write_text(" ".join(map(str, ids)))
    return tmp_path, ids


def test_perplexity(words: tuple[Path, list[int]]) -> None:
    folder, ids = words
    net, windows = NextWord().eval(), torch.tensor(ids[:28]).view(4, 7)
    made = capture(net, (windows,), [{0: "batch", 1: "seq"}])
    reference = Captured(made.graph, made.example_inputs, folder)
    artifact = qcompile.compile(net, (windows,), recipe="w8a8-dynamic", target="reference", dynamic_shapes=[{0: "batch", 1: "seq"}])
    result = evaluate(artifact, "perplexity", f"text:{folder}/text.txt?length=7", reference)
    exact, found = (run(windows)[:, :-1].reshape(24, 10).detach().double() for run in (net, artifact))
    following = windows[:, 1:].reshape(24)
    assert (result.samples, result.unit) == (24, "per token")
    assert result.float_value == pytest.approx(float(torch.nn.functional.cross_entropy(exact, following).exp()), rel=1e-5)
    assert result.value == pytest.approx(float(torch.nn.functional.cross_entropy(found, following).exp()), rel=1e-5)
    assert result.value != pytest.approx(result.float_value, rel=1e-5)
    p, q = exact.softmax(-1), found.softmax(-1)
    assert result.more["kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)
    assert evaluate(artifact, "perplexity", f"text:{folder}/text.txt?length=7", reference, limit=2).samples == 12
    with pytest.raises(Refused, match="fills no window"):
        evaluate(artifact, "perplexity", f"text:{folder}/text.txt?length=32", reference)
    with pytest.raises(Refused, match="has none to judge"):
        evaluate(artifact, "perplexity", f"text:{folder}/text.txt?length=1", reference)


def test_windows_that_overlap_judge_every_token_once(words: tuple[Path, list[int]]) -> None:
    folder, ids = words
    net = NextWord().eval()
    made = capture(net, (torch.tensor([ids[:7]]),), [{0: "batch", 1: "seq"}])
    artifact = qcompile.compile(net, made.example_inputs, recipe="float", target="reference", dynamic_shapes=[{0: "batch", 1: "seq"}])
    result = evaluate(
        artifact, "perplexity", f"text:{folder}/text.txt?length=9&stride=4", Captured(made.graph, made.example_inputs, folder)
    )
    nats = []
    for place in range(1, 29):  # windows begin at 0, 4, .. 20; the last two tokens fill none
        start = 0 if place < 9 else (place - 5) // 4 * 4
        with torch.no_grad():
            logits = net(torch.tensor([ids[start : start + 9]]))[0, place - start - 1].double()
        nats.append(-float(logits.log_softmax(-1)[ids[place]]))
    assert result.samples == len(nats)
    assert result.more["nats_per_token"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert result.value == pytest.approx(float(np.exp(sum(nats) / len(nats))), rel=1e-5)


def test_perplexity_of_what_is_no_language_model_is_refused(words: tuple[Path, list[int]]) -> None:
    folder, ids = words
    vectors = NextWord().eval()
    vectors.head = torch.nn.Linear(8, 4)
    made = capture(vectors, (torch.tensor([ids[:7]]),), [{0: "batch", 1: "seq"}])
    artifact = qcompile.compile(vectors, made.example_inputs, recipe="float", target="reference", dynamic_shapes=[{0: "batch", 1: "seq"}])
    with pytest.raises(Refused, match="the model gives 4 values for each token, and the text has token 9: no language model"):
        evaluate(artifact, "perplexity", f"text:{folder}/text.txt?length=7", Captured(made.graph, made.example_inputs, folder))


# ---- pictures -------------------------------------------------------------------------------------------------------------


class Colour(torch.nn.Module):
    """Says which channel of a picture is brightest."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3, 3)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(3) * 2)
            self.head.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def colours() -> tuple[Artifact, Captured]:
    examples = (torch.rand(1, 3, 8, 8),)
    data = [(torch.rand(2, 3, 8, 8),)]
    artifact = qcompile.compile(Colour(), examples, recipe="w8a8", target="reference", calibration=data, dynamic_shapes=[{0: "batch"}])
    return artifact, capture(Colour(), examples, [{0: "batch"}])


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Ten pictures, each of one colour; the labels of two are wrong."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "class", "label"])
        for number in range(10):
            colour = [20, 20, 20]
            colour[number % 3] = 220
            Image.new("RGB", (8, 8), tuple(colour)).save(folder / f"{number}.png")
            writer.writerow([f"{number}.png", f"colour {number % 3}", (number + (number in (4, 7))) % 3])
    return folder


@pytest.mark.parametrize("batch", [1, 3])
def test_top1(colours: tuple[Artifact, Captured], pictures: Path, batch: int) -> None:
    artifact, reference = colours
    result = evaluate(artifact, "top1", f"images:{pictures}?batch={batch}", reference)
    assert (result.value, result.float_value, result.samples, result.unit) == (80.0, 80.0, 10, "%")
    few = evaluate(artifact, "top1", f"images:{pictures}", None, limit=4)
    assert (few.value, few.float_value, few.samples) == (75.0, None, 4)  # spread over the folder: one wrong label among them


def test_top1_with_labels_elsewhere(colours: tuple[Artifact, Captured], pictures: Path, tmp_path: Path) -> None:
    (pictures / "labels.csv").rename(tmp_path / "truth.csv")
    result = evaluate(colours[0], "top1", f"images:{pictures}?labels={tmp_path / 'truth.csv'}&batch=2", None)
    assert result.value == 80.0
    with pytest.raises(Refused, match=r"labels\.csv: there is no such label file; add labels=FILE\.csv"):
        evaluate(colours[0], "top1", f"images:{pictures}", None)


def test_a_picture_without_label_is_refused(colours: tuple[Artifact, Captured], pictures: Path) -> None:
    Image.new("RGB", (8, 8)).save(pictures / "odd.png")
    with pytest.raises(Refused, match=r"odd\.png: the picture has no label"):
        evaluate(colours[0], "top1", f"images:{pictures}?limit=11", None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.png,3\nb.jpg,0\n", {"a.png": 3, "b.jpg": 0}),
        ("label,file\n7,deep/a.png\n", {"deep/a.png": 7, "a.png": 7}),
        ("file;x\n", None),
        ("a.txt,3\n", None),
        ("", None),
    ],
)
def test_labels(tmp_path: Path, text: str, expected: dict[str, int] | None) -> None:
    (tmp_path / "labels.csv").write_text(text)
    if expected is None:
        with pytest.raises(Refused, match="no rows of a picture file and a label"):
            _read_labels(tmp_path / "labels.csv")
    else:
        assert _read_labels(tmp_path / "labels.csv") == expected


# ---- sentences ------------------------------------------------------------------------------------------------------------


PAIRS = 'split,score,first,second\ndev,5.0,"A man, slowly, eats.",A man is eating.\ndev,0.5,A girl sings.,The stock market fell.\n'


def test_pairs(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(PAIRS)
    scores, first, second = read_pairs(tmp_path / "pairs.csv")
    assert scores.tolist() == [5.0, 0.5]
    assert first == ["A man, slowly, eats.", "A girl sings."]
    assert second == ["A man is eating.", "The stock market fell."]
    assert len(read_pairs(tmp_path / "pairs.csv", 1)[0]) == 1


@pytest.mark.parametrize("text", ["", "a,b\n", "a,b,c\nd,e,f\n", "1,2,3\n4,5,6\n"])
def test_rows_without_score_and_sentences_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(Refused, match="a score and two sentences"):
        read_pairs(tmp_path / "pairs.csv")


SENTENCES = [
    (5.0, "A man is playing a guitar.", "Somebody plays the guitar."),
    (4.2, "A woman is slicing an onion.", "A woman cuts an onion into pieces."),
    (2.5, "A dog runs through the snow.", "A dog sleeps on the sofa."),
    (1.0, "The boy reads a book.", "A boy rides a horse near the beach at sunset."),
    (0.0, "A cat drinks milk.", "The central bank raised interest rates again."),
]


@pytest.fixture(scope="module")
def sentence_encoder(minilm_folder: Path) -> tuple[Artifact, Captured]:
    return qcompile.compile(minilm_folder, recipe="w8a8-dynamic", target="reference"), capture(minilm_folder)


def test_sts(sentence_encoder: tuple[Artifact, Captured], tmp_path: Path) -> None:
    artifact, reference = sentence_encoder
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows(SENTENCES)
    result = evaluate(artifact, "sts", str(tmp_path / "pairs.csv"), reference)
    assert (result.samples, result.unit) == (5, "Spearman")
    assert result.more["cosine_min"] > 0.97
    assert result.more["cosine_min"] <= result.more["cosine"] < 1
    vectors = [peer_embeddings([pair[side] for pair in SENTENCES], reference) for side in (1, 2)]
    expected = spearmanr((vectors[0] * vectors[1]).sum(-1), [pair[0] for pair in SENTENCES]).statistic
    assert result.float_value == pytest.approx(expected)
    assert result.value == pytest.approx(expected, abs=0.1)  # one swap among five


def peer_embeddings(sentences: list[str], reference: Captured) -> np.ndarray:
    """Return embeddings by the model's own tokenizer and module, sentence by sentence and without padding."""
    import transformers

    tokenizer, module = (
        transformers.AutoTokenizer.from_pretrained(reference.folder),
        transformers.AutoModel.from_pretrained(reference.folder).eval(),
    )
    rows = []
    with torch.no_grad():
        for sentence in sentences:
            states = module(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]
            rows.append(torch.nn.functional.normalize(states.mean(0), dim=0))
    return torch.stack(rows).double().numpy()


def test_padding_changes_no_embedding(sentence_encoder: tuple[Artifact, Captured]) -> None:
    from tokenizers import Tokenizer

    _, reference = sentence_encoder
    assert reference.folder is not None
    sentences = [pair[2] for pair in SENTENCES]

    def tokenizer() -> Any:
        return Tokenizer.from_file(str(reference.folder / "tokenizer.json"))

    def run(values: Any) -> Any:
        return reference.graph(*values)

    together = embed_sentences(run, reference.graph, tokenizer(), sentences)
    assert torch.allclose(together, torch.from_numpy(peer_embeddings(sentences, reference)), atol=1e-5)
    assert torch.allclose(together.norm(dim=1), torch.ones(5, dtype=torch.float64))
