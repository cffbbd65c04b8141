"""Scores of pairs of nodes."""

import pytest
import torch

from acefast.nn import HadamardMLP, ScalarProduct
from acefast.nn import decoder as module


@pytest.fixture
def pairs():
    return torch.randint(0, 30, (50, 2), generator=torch.Generator().manual_seed(1))


def test_the_mlp_scores_the_product_of_two_rows(pairs, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 20)  # in three parts
    z = torch.randn(30, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    decoder = HadamardMLP(6, dropout=0.5, seed=3).double().eval()
    scores = decoder(decoder.prepare(pairs, 30), z)
    w, b = decoder.hidden.weight, decoder.hidden.bias
    h = (z[pairs[:, 0]] * z[pairs[:, 1]]) @ w.T + b
    expected = h.clamp(min=0) @ decoder.score.weight[0] + decoder.score.bias
    assert torch.allclose(scores, expected, rtol=1e-12)
    assert torch.allclose(scores, decoder(decoder.prepare(pairs.flip(1), 30), z), rtol=1e-12)
    leaves = [z, *decoder.parameters()]
    for one, two in zip(
        torch.autograd.grad(scores.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves), strict=True
    ):
        assert torch.allclose(one, two, rtol=1e-10, atol=1e-12)
    other = HadamardMLP(6, seed=3).double()
    assert torch.equal(other.hidden.weight, w) and not torch.equal(HadamardMLP(6, seed=4).hidden.weight, w.float())
    assert 0.5 * 6**-0.5 < float(w.detach().abs().max()) <= 6**-0.5


def test_the_noise_of_the_mlp_is_of_seed_step_and_pair(pairs, monkeypatch):
    z = torch.rand(30, 64, generator=torch.Generator().manual_seed(2))
    decoder = HadamardMLP(64, dropout=0.5, seed=3)
    same = decoder.prepare(torch.tensor([[1, 2]] * 8), 30)
    scores = decoder(same, z, seed=5, step=1)
    assert torch.equal(scores, decoder(same, z, seed=5, step=1)) and len(scores.unique()) == 8
    for other in (dict(seed=6, step=1), dict(seed=5, step=2)):
        assert not torch.isclose(scores, decoder(same, z, **other)).any()
    monkeypatch.setattr(module, "CHUNK", 4)
    assert len(decoder(decoder.prepare(torch.tensor([[1, 2]] * 8), 30), z, seed=5, step=1).unique()) == 8


def test_scalar_products(pairs):
    z = torch.randn(30, 6, generator=torch.Generator().manual_seed(2))
    decoder = ScalarProduct()
    expected = (z[pairs[:, 0]] * z[pairs[:, 1]]).sum(1)
    assert torch.allclose(decoder(decoder.prepare(pairs, 30), z), expected, atol=1e-5)
