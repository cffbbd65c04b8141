"""MaskedAdam: any module trains under masks that it does not know of."""

import pytest
import torch
from torch import nn

from acefast import InputError
from acefast.optim import MaskedAdam


def network(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    net[0].weight.data = net[0].weight.data.t().contiguous().t()  # a weight may lie transposed
    return net


def product_rule(net, start, masks, keep, x, y, steps, theta, mask):
    """Weights and masks after `steps` of torch's Adam on both factors; the elements with keep False are left out."""
    weights = [nn.Parameter(w.clone()) for w in start]
    soft = [nn.Parameter(m.clone()) for m in masks]
    adam = torch.optim.Adam([{"params": weights, **theta}, {"params": soft, **mask["adam"]}])
    for _ in range(steps):
        adam.zero_grad()
        parameters = {f"{i}.weight": w * m * k for i, w, m, k in zip((0, 2), weights, soft, keep, strict=True)}
        loss = nn.functional.cross_entropy(torch.func.functional_call(net, parameters, (x,)), y)
        loss.backward()
        for p, k in zip(soft, keep, strict=True):
            p.grad += mask["l1"] * p.detach().sign() * k
        adam.step()
    return [[p.detach() for p in part] for part in (weights, soft)]


@pytest.mark.parametrize(("pruned", "compact"), [(False, True), (True, True), (True, False)])
def test_it_is_adam_by_the_product_rule(pruned, compact):
    net, generator = network(), torch.Generator().manual_seed(1)
    weights = [net[0].weight, net[2].weight]
    start = [w.detach().clone() for w in weights]
    masks = [1 + 0.1 * torch.rand(w.shape, generator=generator, dtype=torch.float64) for w in weights]
    keep = [torch.rand(w.shape, generator=generator) < (0.6 if pruned else 2) for w in weights]
    x, y = torch.randn(20, 6, generator=generator).double(), torch.randint(0, 3, (20,), generator=generator)
    theta = dict(lr=0.02, weight_decay=1e-3 * (not pruned))
    mask = {"adam": dict(lr=0.03), "l1": 1e-2}
    expected = product_rule(network(), start, masks, keep, x, y, 100, theta, mask)
    optimizer = MaskedAdam(weights, masks, keep if pruned else None, compact, **theta, mask_lr=0.03, mask_l1=1e-2)
    for w, s, m, k in zip(weights, start, masks, keep, strict=True):
        assert torch.equal(w, s * m * k)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    for i, (w, k) in enumerate(zip(weights, keep, strict=True)):
        found = [optimizer.expand(w, part) for part in optimizer.factors(w)]
        for part, name in zip(found, ("theta", "mask"), strict=True):
            assert part.shape == w.shape and not part[~k].any()
            wanted = expected[name == "mask"][i]
            assert torch.allclose(part[k], wanted[k], rtol=0, atol=1e-6), name
        assert torch.allclose(w, found[0] * found[1], rtol=1e-12) and not w[~k].any()


def test_groups_state_and_schedulers():
    """Groups with and without masks; a state that is saved and loaded goes on to the same bits; a scheduler sets lr."""
    runs = []
    for interrupted in (False, True):
        net = network()
        masks = [torch.ones(5, 6, dtype=torch.float64)]

        def groups(net=net, masks=masks):
            rest = [p for p in net.parameters() if p is not net[0].weight]
            return [{"params": [net[0].weight], "masks": masks, "mask_l1": 1e-2}, {"params": rest, "lr": 0.01}]

        optimizer = MaskedAdam(groups(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        x, y = torch.randn(20, 6, generator=torch.Generator().manual_seed(2)).double(), torch.arange(20) % 3
        for step in range(8):
            if interrupted and step == 4:
                saved = optimizer.state_dict()
                optimizer = MaskedAdam(groups())
                optimizer.load_state_dict(saved)
                scheduler.optimizer = optimizer
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 / 4)
        runs.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("compact", [False, True])
def test_removed_elements_stay_removed_without_masks(compact):
    """Both ways of holding the state take the same steps, also from a state that is loaded, and the parameter is its own theta
    where no list is kept."""
    draw = torch.Generator().manual_seed(5)
    start, keep = torch.randn(7, 9, generator=draw), torch.rand(7, 9, generator=draw) < 0.6
    w = nn.Parameter(start.clone())
    optimizer = MaskedAdam([w], keep=[keep], compact=compact, lr=0.1, weight_decay=1e-2, l1=1e-3)
    wanted = (start * keep).requires_grad_()
    adam = torch.optim.Adam([wanted], lr=0.1, weight_decay=1e-2)
    for step in range(6):
        if step == 3:
            saved = optimizer.state_dict()
            w = nn.Parameter(torch.randn(7, 9, generator=draw))
            optimizer = MaskedAdam([w], keep=[keep], compact=compact, lr=0.1, weight_decay=1e-2, l1=1e-3)
            optimizer.load_state_dict(saved)
            theta = optimizer.factors(w)[0]
            if compact:
                assert theta.numel() == keep.sum()
                w.data.copy_(optimizer.expand(w, theta))
            else:
                assert theta.data_ptr() == w.data_ptr()
        for p in (w, wanted):
            p.grad = p.detach().cos() * keep if p is w else p.detach().cos() * keep + 1e-3 * p.detach().sign()
        optimizer.step()
        adam.step()
        assert torch.allclose(w, wanted, atol=1e-6) and not w[~keep].any()
    assert torch.equal(optimizer.expand(w, optimizer.factors(w)[0], start)[~keep], start[~keep])


def test_refusals():
    w = nn.Parameter(torch.randn(3, 4))
    with pytest.raises(InputError, match=r"masks must be tensors like the parameters \[\[3, 4\]\], got \[\[4, 3\]\]"):
        MaskedAdam([w], masks=[torch.ones(4, 3)])
    with pytest.raises(InputError, match="keep must be tensors like"):
        MaskedAdam([w], keep=[])
    with pytest.raises(InputError, match="has no gradient"):
        MaskedAdam([w]).step()
    with pytest.raises(InputError, match="contiguous or transposed"):
        MaskedAdam([nn.Parameter(torch.randn(3, 8)[:, ::2])])
    with pytest.raises(InputError, match="lr must be a finite number"):
        w.grad = torch.ones_like(w)
        MaskedAdam([w], lr=-1.0).step()
