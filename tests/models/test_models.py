"""The models of benchmarks/models are what they say: their published accuracy, and the same function once outliers are planted."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import onnxruntime
import pytest
import torch


@pytest.fixture(scope="module")
def models(repository: Path) -> Iterator[dict[str, ModuleType]]:
    """The files of benchmarks/models, loaded by path as ``python:FILE:FUNCTION`` loads them."""
    loaded = {}
    for name in ("data", "mcunet", "minilm", "onnx_file", "random_nets", "resnet20", "wikilm"):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", repository / "benchmarks" / "models" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        loaded[name] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded[name])
    yield loaded
    for module in loaded.values():
        del sys.modules[module.__name__]


@torch.no_grad()
def top1(net: torch.nn.Module, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> tuple[int, int]:
    """Return how many pictures were named rightly, and how many there were."""
    right = count = 0
    for pictures, labels in batches:
        right += int((net(pictures).argmax(1) == labels).sum())
        count += len(labels)
    return right, count


# The whole sample gives 68.9 %, every tenth class 68; two pictures either way are left to ties on other processors. Swapped colours
# give 49, no normalisation 44, an epsilon of 1e-3 in batch normalisation 59.
def test_mcunet_names_pictures(models: dict[str, ModuleType], data_folder: Path) -> None:
    net, _, _ = models["mcunet"].mcunet()
    right, count = top1(net, models["data"].imagenet_batches(step=10))
    assert count == 100
    assert 66 <= right <= 70


# The whole test set gives 81.0 %; three standard errors at 500 pictures are 5.3 %.
def test_resnet20_names_pictures(models: dict[str, ModuleType], data_folder: Path) -> None:
    net, _, _ = models["resnet20"].resnet20()
    right, count = top1(net, models["data"].cifar10_batches(step=20))
    assert count == 500
    assert 378 <= right <= 432


def test_resnet20_as_onnx_file_is_the_same_function(models: dict[str, ModuleType], data_folder: Path, tmp_path: Path) -> None:
    net, inputs, _ = models["resnet20"].resnet20()
    models["onnx_file"].write(net, inputs, tmp_path / "net.onnx")
    pictures, _ = next(models["data"].cifar10_batches(size=8, step=1000))
    (found,) = onnxruntime.InferenceSession(tmp_path / "net.onnx").run(None, {"input0": pictures.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), net(pictures), rtol=1e-4, atol=1e-4)  # sums of 576 products in another order


def test_wikilm_equals_transformers(models: dict[str, ModuleType], data_folder: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    net, tokens, _ = models["wikilm"].wikilm()
    peer = transformers.LlamaForCausalLM.from_pretrained(models["wikilm"].folder(), dtype=torch.float32).eval()
    with torch.no_grad():
        ours, theirs = net(*tokens), peer(*tokens).logits
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


def test_planted_outliers_keep_the_function(models: dict[str, ModuleType], data_folder: Path) -> None:
    wikilm = models["wikilm"]
    seen = {}

    def watch(name: str, net: torch.nn.Module) -> torch.Tensor:
        net.layers[2].mlp.gate_proj.register_forward_pre_hook(lambda _, inputs: seen.update({name: inputs[0].abs().amax((0, 1))}))
        with torch.no_grad():
            return net(*tokens)

    plain_net, tokens, _ = wikilm.wikilm()
    plain, planted = watch("plain", plain_net), watch("planted", wikilm.wikilm_planted()[0])
    assert float((planted - plain).abs().max() / plain.abs().max()) < 1e-5
    grown = seen["planted"] / seen["plain"]
    assert torch.allclose(grown[list(wikilm.PLANTED_CHANNELS)], torch.tensor(wikilm.PLANTED_FACTOR), rtol=1e-3)
    assert int((grown > 2).sum()) == len(wikilm.PLANTED_CHANNELS)


def test_sentence_embeddings_follow_meaning_not_padding(models: dict[str, ModuleType], minilm_folder: Path) -> None:
    minilm = models["minilm"]
    assert minilm.folder() == minilm_folder
    net, _, _ = minilm.minilm_sentences()
    near = ["A man is playing a guitar.", "Somebody plays the guitar."]
    with torch.no_grad():
        vectors = net(*minilm.tokenize([*near, "Inflation slowed in October, said the central bank of the country on Monday."]))
        alone = net(*minilm.tokenize(near[:1]))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(alone[0], vectors[0], rtol=0, atol=1e-5)
    assert float(vectors[0] @ vectors[1]) > 0.7
    assert float(vectors[0] @ vectors[2]) < 0.2


def test_readers_cut_what_they_are_asked_for(models: dict[str, ModuleType], data_folder: Path) -> None:
    data = models["data"]
    pictures, labels = next(data.imagenet_batches(size=3, resize=256, crop=224, step=400))
    assert pictures.shape == (3, 3, 224, 224)
    assert labels.tolist() == [0, 400, 800]
    assert float(pictures.min()) >= -1
    assert float(pictures.max()) <= 1
    assert [len(labels) for _, labels in data.cifar10_batches(size=4, count=10)] == [4, 4, 2]
    first, second, scores = data.sentence_pairs("dev")
    assert len(first) == len(second) == len(scores) == 1500
    assert scores.min() == 0
    assert scores.max() == 5


def test_random_net_is_the_same_each_time(models: dict[str, ModuleType]) -> None:
    (first, inputs, _), (second, _, _) = models["random_nets"].mobilenet_v2(), models["random_nets"].mobilenet_v2()
    with torch.no_grad():
        assert torch.equal(first(*inputs), second(*inputs))


# With batch normalisation's initial statistics the outputs would be of size 1.4 and 670.
@pytest.mark.parametrize(("name", "parameters"), [("mobilenet_v2", 3_504_872), ("resnet50", 25_557_032)])
def test_random_net_has_a_trained_nets_magnitude(models: dict[str, ModuleType], name: str, parameters: int) -> None:
    net, inputs, _ = getattr(models["random_nets"], name)()
    assert sum(p.numel() for p in net.parameters()) == parameters
    with torch.no_grad():
        assert 0.05 < float(net(*inputs).std()) < 1
