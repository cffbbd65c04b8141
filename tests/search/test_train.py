import pytest
import torch
import torch.nn.functional as F

from acefast.errors import InputError
from acefast.nn import GCN
from acefast.pruning import Pattern, SoftMasks
from acefast.train import Schedule, train


def setup(tiny):
    model = GCN(tiny.num_features, 8, tiny.num_classes, dropout=0.0, seed=2)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    full = Pattern.full(tiny.graph.num_edges, model.maskable())
    return model, start, full


def test_training_is_the_plain_loop_with_product_rule_l1_and_adam(tiny):
    model, start, full = setup(tiny)
    keep = full.map(lambda t: (torch.arange(t.numel()) % 4 > 0).view(t.shape))
    make = lambda name: torch.Generator().manual_seed(1)  # noqa: E731
    masks = SoftMasks.init(keep, 1e-5, make)
    schedule = Schedule(12, lr=0.05, weight_decay=1e-3, mask_lr=0.02, mask_weight_decay=1e-3, s1=1e-2, s2=2e-2)
    seen = []
    fit = train(model, tiny, schedule, start, keep, masks, keep_weights=True, on_epoch=lambda *e: seen.append(e))

    other = GCN(tiny.num_features, 8, tiny.num_classes, dropout=0.0, seed=2)
    again = SoftMasks.init(keep, 1e-5, make).map(lambda m: m.requires_grad_())
    leaves = [again.edges, *again.weights.values()]
    groups = [
        {"params": list(other.parameters()), "lr": 0.05, "weight_decay": 1e-3},
        {"params": leaves, "lr": 0.02, "weight_decay": 1e-3},
    ]
    adam = torch.optim.Adam(groups)
    best = (-1.0, None)
    for epoch in range(12):
        adam.zero_grad()
        logits = other(tiny.graph, tiny.x, again.edges, keep.edges, again.weights, keep.weights)
        loss = F.cross_entropy(logits[tiny.train], tiny.y[tiny.train])
        loss = loss + 1e-2 * again.edges.abs().sum() + 2e-2 * sum(m.abs().sum() for m in again.weights.values())
        loss.backward()
        adam.step()
        with torch.no_grad():
            logits = other(tiny.graph, tiny.x, again.edges, keep.edges, again.weights, keep.weights)
        right = logits.argmax(1) == tiny.y
        val, test = (float(right[i].float().mean()) for i in (tiny.val, tiny.test))
        assert seen[epoch] == (epoch, pytest.approx(val), pytest.approx(test))
        if val > best[0]:
            copy = again.map(lambda m: m.detach().clone())
            best = (val, epoch, test, copy, {n: p.detach().clone() for n, p in other.named_parameters()})
    assert (fit.val, fit.best_epoch, fit.test) == (pytest.approx(best[0]), best[1], pytest.approx(best[2]))
    assert torch.allclose(fit.masks.edges, best[3].edges, atol=1e-5)
    assert bool((fit.masks.edges[~keep.edges] == 0).all())
    for name, kept in keep.weights.items():
        assert torch.allclose(fit.masks.weights[name], best[3].weights[name], atol=1e-5)
        assert torch.allclose(fit.weights[name][kept], best[4][name][kept], atol=1e-5)


def test_training_starts_from_the_given_weights_each_time(tiny):
    model, start, _ = setup(tiny)
    schedule = Schedule(5, lr=0.05)
    one, two = train(model, tiny, schedule, start), train(model, tiny, schedule, start)
    assert (one.val, one.val_loss, one.test, one.best_epoch) == (two.val, two.val_loss, two.test, two.best_epoch)
    assert one.masks is None and one.weights is None


def test_sharing_the_noise_free_part_changes_no_bit(tiny):
    class Plain(torch.nn.Module):
        """The same network without ``before_noise``."""

        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, *args, **kwargs):
            return self.model(*args, **kwargs)

    model = GCN(tiny.num_features, 8, tiny.num_classes, dropout=0.5, seed=2)
    schedule = Schedule(20, lr=0.05, mask_lr=0.05, s1=1e-2, s2=1e-2)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    fits = []
    for network, start in ((model, first), (Plain(model), {f"model.{name}": p for name, p in first.items()})):
        masks = SoftMasks.init(
            Pattern.full(tiny.graph.num_edges, model.maskable()), 1e-5, lambda name: torch.Generator().manual_seed(1)
        )
        fits.append(train(network, tiny, schedule, start, masks=masks, seed=4))
    one, two = fits
    assert (one.val, one.val_loss, one.test, one.best_epoch) == (two.val, two.val_loss, two.test, two.best_epoch)
    assert torch.equal(one.masks.edges, two.masks.edges)
    assert all(torch.equal(one.masks.weights[name], two.masks.weights[name]) for name in one.masks.weights)


def test_divergence_is_said(tiny):
    model, start, _ = setup(tiny)
    start["layers.0.lin.weight"] = torch.full_like(start["layers.0.lin.weight"], float("nan"))
    with pytest.raises(InputError, match="diverged"):
        train(model, tiny, Schedule(2, lr=0.1), start)
