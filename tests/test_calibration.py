"""Calibration sources: what they give, and one clear line for everything that does not fit."""

import logging
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from qcompile.calibration import check_batch, from_iterable, parse_calibration
from qcompile.errors import Refused
from qcompile.graph import parse_graph
from qcompile.graph.graph import Graph

PLAIN = """graph @main float(%x: f32[batch,4]) where batch in 1..64 {
  %relu = aten.relu(%x) : f32[batch,4]
  return %relu as "y"
}
"""
IMAGE = """graph @main float(%x: f32[batch,3,6,8]) where batch in 1..64 {
  %relu = aten.relu(%x) : f32[batch,3,6,8]
  return %relu as "y"
}
"""
TOKENS = """graph @main float(%input_ids: i64[batch,tokens], %attention_mask: i64[batch,tokens]) where batch in 1..64, tokens in 1..16 {
  %add = aten.add.Tensor(%input_ids, %attention_mask) : i64[batch,tokens]
  return %add as "y"
}
"""


@pytest.fixture
def plain() -> Graph:
    return parse_graph(PLAIN, {})


def array(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


# ---- arrays ---------------------------------------------------------------------------------------------------------------


def test_npz_is_cut_into_batches(plain: Graph, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=array(20, 4), labels=array(20))
    data = parse_calibration(f"{tmp_path}/a.npz?batch=8")
    parts = list(data.batches(plain))
    assert [len(part[0]) for part in parts] == [8, 8, 4]
    assert torch.equal(torch.cat([part[0] for part in parts]), torch.from_numpy(array(20, 4)))
    assert data.samples == 20
    assert next(iter(data.batches(plain)))[0].equal(parts[0][0])
    assert parse_calibration(f"{tmp_path}/a.npz?limit=3", limit=9).samples == 3
    assert parse_calibration(f"{tmp_path}/a.npz", limit=9).samples == 9


def test_npy_is_the_one_input(plain: Graph, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array(3, 4))
    assert torch.equal(next(parse_calibration(f"{tmp_path}/a.npy").batches(plain))[0], torch.from_numpy(array(3, 4)))
    with pytest.raises(Refused, match=r"a\.npy: one array for 2 inputs \(input_ids, attention_mask\)"):
        list(parse_calibration(f"{tmp_path}/a.npy").batches(parse_graph(TOKENS, {})))


def test_a_fixed_batch_gets_whole_batches(tmp_path: Path) -> None:
    graph = parse_graph(PLAIN.replace("batch in 1..64", "n in 1..2").replace("batch", "2"), {})
    np.savez(tmp_path / "a.npz", x=array(5, 4))
    assert [len(part[0]) for part in parse_calibration(f"{tmp_path}/a.npz").batches(graph)] == [2, 2]


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"y": array(2, 4)}, r"input 'x' is missing; it has y"),
        ({"x": array(2, 5)}, r"input 'x' is f32\[batch,4\], batch in 1..64, the data is f32\[2,5\]"),
        ({"x": array(2, 4, dtype=np.float64)}, r"the data is f64\[2,4\]"),
        ({"x": array(2, 4) * np.nan}, r"input 'x' holds NaN or infinity"),
        ({"x": array(0, 4)}, r"array 'x' has no samples"),
        ({"x": array(2, 4), "z": array(3)}, r"different numbers of samples \(x: 2, z: 3\)"),
        ({"x": np.array([["a"] * 4])}, r"which is no number"),
        ({"x": np.array([None] * 4)}, r"Python objects"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(plain: Graph, tmp_path: Path, arrays: dict[str, np.ndarray], reason: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(Refused, match=rf"bad\.npz: .*{reason}") as raised:
        list(parse_calibration(f"{tmp_path}/bad.npz").batches(plain))
    assert "\n" not in str(raised.value)


def test_archive_that_expands_is_refused_before_it_does(plain: Graph, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "small.npz", x=np.zeros((2**20, 17), np.float32))
    with pytest.raises(Refused, match="would expand from"):
        list(parse_calibration(f"{tmp_path}/small.npz").batches(plain))
    with zipfile.ZipFile(tmp_path / "liar.npz", "w") as archive, archive.open("x.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 4)})
    with pytest.raises(Refused, match="would expand from"):
        list(parse_calibration(f"{tmp_path}/liar.npz").batches(plain))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no archive at all"])
@pytest.mark.parametrize("ending", ["npz", "npy"])
def test_damaged_files_are_refused(plain: Graph, tmp_path: Path, content: bytes, ending: str) -> None:
    (tmp_path / f"bad.{ending}").write_bytes(content)
    with pytest.raises(Refused, match="cannot be read"):
        list(parse_calibration(f"{tmp_path}/bad.{ending}").batches(plain))


# ---- pictures -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    from PIL import Image

    for i in range(6):
        pixels = np.full((12, 20, 3), (10 * i, 100, 200), np.uint8)
        (tmp_path / f"class{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"class{i % 2}" / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    return tmp_path


def test_pictures_are_resized_cropped_and_scaled(pictures: Path) -> None:
    spec = f"images:{pictures}?resize=8&crop=6x8&mean=0.5,0.25,0&std=0.5,1,2&limit=2"
    (batch,) = (part[0] for part in parse_calibration(spec).batches(parse_graph(IMAGE, {})))
    assert batch.shape == (2, 3, 6, 8)
    expected = torch.tensor([(0 / 255 - 0.5) / 0.5, 100 / 255 - 0.25, 200 / 255 / 2])
    torch.testing.assert_close(batch[0, :, 0, 0], expected)
    assert float(batch[1, 0, 0, 0]) == pytest.approx((10 / 255 - 0.5) / 0.5)  # evenly spaced: one of each folder
    swapped = next(parse_calibration(spec + "&order=bgr&batch=1").batches(parse_graph(IMAGE, {})))[0]
    assert float(swapped[0, 0, 0, 0]) == pytest.approx((200 / 255 - 0.5) / 0.5)


def test_grey_for_one_channel(pictures: Path) -> None:
    graph = parse_graph(IMAGE.replace("3,6,8", "1,12,20"), {})
    assert next(parse_calibration(f"images:{pictures}").batches(graph))[0].shape == (6, 1, 12, 20)


def test_pictures_that_do_not_fit_are_refused(pictures: Path, plain: Graph) -> None:
    graph = parse_graph(IMAGE, {})
    with pytest.raises(Refused, match=r"the data is f32\[6,3,12,20\]"):
        list(parse_calibration(f"images:{pictures}").batches(graph))
    with pytest.raises(Refused, match="smaller than the crop of 99 x 99"):
        list(parse_calibration(f"images:{pictures}?crop=99").batches(graph))
    with pytest.raises(Refused, match="one input of four axes"):
        list(parse_calibration(f"images:{pictures}").batches(plain))
    (pictures / "class0" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(Refused, match=r"bad\.png: the picture cannot be read"):
        list(parse_calibration(f"images:{pictures}?resize=6x8").batches(graph))
    (pictures / "empty").mkdir()
    with pytest.raises(Refused, match="no calibration data"):
        list(parse_calibration(f"images:{pictures}/empty").batches(graph))


def test_digest_follows_content_and_options(pictures: Path) -> None:
    def digest(options: str = "") -> str:
        return parse_calibration(f"images:{pictures}{options}").digest

    first = digest()
    assert first == digest()
    assert len({first, digest("?limit=2"), digest("?mean=0.5"), digest("?batch=2")}) == 4
    (pictures / "class0" / "0.png").write_bytes((pictures / "class1" / "1.png").read_bytes())
    assert digest() != first


# ---- text -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "a": 4, "b": 5, "c": 6}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("a b\n\nc\nb a\na b c a b c a b c\n", encoding="utf-8")
    return tmp_path


def test_text_of_any_length_is_batched_without_padding(tokenizer: Path) -> None:
    data = parse_calibration(f"text:{tokenizer}/text.txt?length=6", tokenizer_folder=tokenizer)
    found = [(ids.tolist(), mask.tolist()) for ids, mask in data.batches(parse_graph(TOKENS, {}))]
    ones = [[1] * 4] * 2
    assert found == [([[1, 4, 5, 2], [1, 5, 4, 2]], ones), ([[1, 6, 2]], [[1] * 3]), ([[1, 4, 5, 6, 4, 2]], [[1] * 6])]
    assert data.samples == 4


def test_text_is_padded_to_a_fixed_size(tokenizer: Path) -> None:
    graph = parse_graph(TOKENS.replace("tokens in 1..16", "t in 1..2").replace("tokens", "4"), {})
    ids, mask = next(parse_calibration(f"text:{tokenizer}/text.txt", tokenizer_folder=tokenizer).batches(graph))
    assert ids.tolist() == [[1, 4, 5, 2], [1, 6, 2, 0], [1, 5, 4, 2], [1, 4, 5, 2]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_text_in_chunks(tokenizer: Path) -> None:
    data = parse_calibration(f"text:{tokenizer}/text.txt?length=4&split=chunks", tokenizer_folder=tokenizer)
    ((ids, _),) = data.batches(parse_graph(TOKENS, {}))
    assert ids.tolist() == [[1, 4, 5, 6], [1, 5, 4, 4], [1, 5, 6, 4], [1, 5, 6, 4]]


def test_text_that_does_not_fit_is_refused(tokenizer: Path, plain: Graph) -> None:
    data = parse_calibration(f"text:{tokenizer}/text.txt", tokenizer_folder=tokenizer)
    with pytest.raises(Refused, match="input 'pixels' is not one that text gives"):
        list(data.batches(parse_graph(TOKENS.replace("attention_mask", "pixels"), {})))
    with pytest.raises(Refused, match=r"needs the model's tokenizer\.json"):
        parse_calibration(f"text:{tokenizer}/text.txt", tokenizer_folder=tokenizer / "elsewhere")
    (tokenizer / "text.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Refused, match="no UTF-8"):
        list(parse_calibration(f"text:{tokenizer}/text.txt", tokenizer_folder=tokenizer).batches(parse_graph(TOKENS, {})))


# ---- noise and Python -----------------------------------------------------------------------------------------------------


def test_random_is_seeded_and_warns(plain: Graph, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        first = list(parse_calibration("random?limit=20").batches(plain))
    assert "random data" in caplog.text
    assert [len(part[0]) for part in first] == [8, 8]
    again = list(parse_calibration("random?limit=20").batches(plain))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(next(parse_calibration("random?seed=1").batches(plain))[0], first[0][0])


def test_random_integers_stay_within_the_example() -> None:
    examples = [torch.tensor([[3, 9, 5]]), torch.ones(1, 3, dtype=torch.long)]
    for ids, mask in parse_calibration("random", example_inputs=examples).batches(parse_graph(TOKENS, {})):
        assert ids.shape == mask.shape == (8, 3)
        assert 3 <= int(ids.min()) <= int(ids.max()) <= 9
        assert mask.all()


def test_random_integers_stay_within_the_embedding() -> None:
    from qcompile.graph.graph import tensor_digest

    table = torch.randn(5, 2)
    text = f"""graph @main float(%ids: i64[batch]) where batch in 1..64 {{
  %t = const f32[5,2] @{tensor_digest(table)[:16]}
  %embedding = aten.embedding(%t, %ids) : f32[batch,2]
  return %embedding as "y"
}}
"""
    graph = parse_graph(text, {tensor_digest(table)[:16]: table})
    drawn = torch.cat([ids for (ids,) in parse_calibration("random").batches(graph)])
    assert set(drawn.tolist()) == {0, 1, 2, 3, 4}


def test_python_iterables(plain: Graph) -> None:
    x = torch.randn(3, 4)
    for data in ([x], [(x,)], [{"x": x, "label": 1}], ((x,) for _ in range(1)), x, [x.numpy()]):
        source = from_iterable(data)
        assert [torch.equal(part[0], x) for part in source.batches(plain)] == [True]
        assert [torch.equal(part[0], x) for part in source.batches(plain)] == [True]
        assert source.samples == 3
    assert from_iterable([x]).digest == from_iterable([x.clone()]).digest != from_iterable([x + 1]).digest
    assert len(list(from_iterable([x] * 9, limit=7).batches(plain))) == 3


def test_python_data_that_does_not_fit_is_refused(plain: Graph) -> None:
    for data, reason in [
        ([(torch.ones(1, 4), torch.ones(1))], r"2 tensors for 1 inputs \(x\)"),
        ([{"y": torch.ones(1, 4)}], "input 'x' is missing; it has y"),
        (["text"], "holds str"),
        ([], "no calibration data"),
    ]:
        with pytest.raises(Refused, match=f"calibration data: .*{reason}"):
            list(from_iterable(data).batches(plain))


def test_symbols_must_agree_between_inputs() -> None:
    graph = parse_graph(TOKENS, {})
    check_batch(graph, [torch.ones(2, 5).long()] * 2, "data")
    with pytest.raises(Refused, match="input 'attention_mask' is"):
        check_batch(graph, [torch.ones(2, 5).long(), torch.ones(2, 6).long()], "data")
    with pytest.raises(Refused, match=r"tokens in 1\.\.16, the data is i64\[2,17\]"):
        check_batch(graph, [torch.ones(2, 17).long()] * 2, "data")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("photos", "'photos' is no calibration data"),
        ("nowhere.npz", r"nowhere\.npz: there is no such file"),
        ("images:/nowhere", "/nowhere: there is no such file"),
        ("random?sed=1", "unknown option 'sed'; did you mean 'seed'"),
        ("random?seed=x", "seed of data is a number, not 'x'"),
        ("random?limit=0", "at least 1"),
        ("random?limit=1&limit=2", "the option 'limit=2' is not understood"),
        ("images:.?mean=a", "mean is one number or three, not 'a'"),
        ("images:.?std=0", "std and scale are not zero"),
        ("images:.?crop=1x2x3", "crop is a size or HxW"),
        ("images:.?order=gbr", "order is rgb or bgr"),
    ],
)
def test_texts_that_are_refused(text: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        parse_calibration(text)
