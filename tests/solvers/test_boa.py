"""BoA: GPTQ where heads do not matter, and what is gained on its own objective where they do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import Refused
from qcompile.formats import parse_scheme
from qcompile.solvers import boa, gptq

SCHEMES = ["int4 channel=0 sym", "uint3 group=8 affine", "int2 channel=0 sym", "int3 tensor sym"]
seeds = st.integers(0, 2**31)


def layer(seed: int, heads: int = 3, d: int = 8, inputs: int = 16) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the weight of a projection, the Gram matrix of its inputs and matrices of its heads."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, inputs, generator=generator).double() @ torch.randn(inputs, inputs, generator=generator).double()
    k = torch.randn(heads, 50, d, generator=generator).double() @ torch.randn(heads, d, d, generator=generator).double()
    return torch.randn(heads * d, inputs, generator=generator), {"gram": x.T @ x / 200, "heads": k.transpose(1, 2) @ k / 50}


@pytest.mark.parametrize("scheme", SCHEMES)
@given(seed=seeds)
@settings(max_examples=4, deadline=None)
def test_without_the_output_side_it_is_gptq(scheme: str, seed: int) -> None:
    parsed, (weight, statistics) = parse_scheme(scheme), layer(seed)
    theirs = gptq.solve(weight, statistics, parsed, keep_better=False)
    for heads in (torch.eye(8).double().expand(3, 8, 8), 7 * torch.eye(8).double().expand(3, 8, 8)):
        mine = boa.solve(weight, statistics | {"heads": heads}, parsed, keep_better=False)
        assert torch.equal(mine.codes, theirs.codes)
        assert torch.equal(mine.scale, theirs.scale)
    alone = boa.solve(weight, {"gram": statistics["gram"]}, parsed)
    assert torch.equal(alone.codes, gptq.solve(weight, statistics, parsed).codes)


def obq_by_rows(weight: torch.Tensor, H_in: torch.Tensor, H_out: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return int3 codes of one head, rounded one weight at a time on the whole Kronecker product by elimination."""
    d, n = weight.shape
    w, codes = weight.double().reshape(-1).clone(), torch.empty(d * n)
    inverse = torch.linalg.inv(torch.kron(H_out, H_in))
    for i in range(d * n):
        codes[i] = (w[i].float() / scale[i // n]).round().clamp(-4, 3)
        error = (w[i] - codes[i].double() * scale[i // n].double()) / inverse[i, i]
        w -= error * inverse[i]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes.reshape(d, n)


@given(seed=seeds)
@settings(max_examples=6, deadline=None)
def test_it_is_obq_on_the_kronecker_product(seed: int) -> None:
    scheme, (weight, statistics) = parse_scheme("int3 channel=0 sym"), layer(seed, heads=2, d=4, inputs=6)
    found = boa.solve(weight, statistics, scheme, damping=0.0, act_order=False, keep_better=False)
    for head in range(2):
        rows = slice(4 * head, 4 * head + 4)
        expected = obq_by_rows(weight[rows], statistics["gram"], statistics["heads"][head], found.scale[rows])
        assert torch.equal(found.codes[rows].float(), expected)


def test_it_gains_on_its_own_objective() -> None:
    scheme, gained = parse_scheme("int2 channel=0 sym"), []
    for seed in range(8):
        weight, statistics = layer(seed)
        both = [solve(weight, statistics, scheme).dequantize() for solve in (boa.solve, gptq.solve)]
        mine, theirs = (float(boa.head_errors(weight, q, statistics["gram"], statistics["heads"]).sum()) for q in both)
        gained.append(mine / theirs)
    assert sum(gained) / len(gained) < 0.9


def test_refusals() -> None:
    weight, statistics = layer(0)
    with pytest.raises(Refused, match=r"the heads \[3, 7, 7\] do not fit the weight \[24, 16\]"):
        boa.solve(weight, statistics | {"heads": torch.eye(7).expand(3, 7, 7)}, parse_scheme(SCHEMES[0]))
    with pytest.raises(Refused, match="needs the Gram matrix"):
        boa.solve(weight, {}, parse_scheme(SCHEMES[0]))
