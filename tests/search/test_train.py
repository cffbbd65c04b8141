from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from acefast.data import synthetic_citation
from acefast.errors import InputError
from acefast.kept import KeptWeights
from acefast.nn import GCN, build, state_of
from acefast.pruning import Pattern, SoftMasks
from acefast.train import Schedule, lists_edges, train


def setup(tiny):
    model = GCN(tiny.num_features, 8, tiny.num_classes, dropout=0.0, seed=2)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    full = Pattern.full(tiny.graph.num_edges, model.maskable())
    return model, start, full


@pytest.mark.parametrize("fast", [True, False])
def test_training_is_the_plain_loop_with_product_rule_l1_and_adam(tiny, fast):
    model, start, full = setup(tiny)
    keep = full.map(lambda t: (torch.arange(t.numel()) % 4 > 0).view(t.shape))
    make = lambda name: torch.Generator().manual_seed(1)  # noqa: E731
    masks = SoftMasks.init(keep, 1e-5, make)
    schedule = Schedule(12, lr=0.05, weight_decay=1e-3, mask_lr=0.02, mask_weight_decay=1e-3, s1=1e-2, s2=2e-2)
    seen = []
    fit = train(model, tiny, schedule, start, keep, masks, keep_weights=True, on_epochs=lambda first, vals: seen.append((first, *vals)),
                fast=fast)  # fmt: skip

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
        assert seen[epoch] == (epoch, pytest.approx(val))
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
    one, two = (train(model, tiny, schedule, start) for _ in range(2))
    assert (one.val, one.val_loss, one.test, one.best_epoch) == (two.val, two.val_loss, two.test, two.best_epoch)
    assert one.masks is None and one.weights is None


@pytest.mark.parametrize("backbone", ["gin", "gat"])
def test_zeroed_edges_train_on_the_whole_graph(backbone):
    data = synthetic_citation(
        400, 60, 3, seed=2, num_edges=800, words=6.0, train_per_class=6, num_val=40, num_test=50, name="small"
    )
    model = build(backbone, data.num_features, data.num_classes, hidden=8, pruned="in_denominator", seed=2)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    full = Pattern.full(data.graph.num_edges, model.maskable())
    pattern = Pattern(torch.arange(data.graph.num_edges) % 3 > 0, full.weights)
    fits = []
    for fast in (True, False):
        masks = SoftMasks.init(pattern, 1e-5, lambda name: torch.Generator().manual_seed(1))
        fits.append(train(model, data, Schedule(8, lr=0.01, mask_lr=0.01, s1=1e-3), start, pattern, masks, seed=4, fast=fast))
    assert fits[0].val_loss == pytest.approx(fits[1].val_loss, rel=1e-5)
    assert torch.allclose(fits[0].masks.edges, fits[1].masks.edges, atol=1e-5)


@pytest.mark.parametrize("backbone", ["gcn", "gat", "resgcn"])
def test_flags_of_kept_edges_train_as_their_lists_do(monkeypatch, tiny, backbone):
    data = replace(tiny, graph=tiny.graph.with_self_loops()) if backbone == "gat" else tiny
    model = build(backbone, data.num_features, data.num_classes, hidden=8, layers=2, seed=2)
    start = {name: value.clone() for name, value in state_of(model).items()}
    full = Pattern.full(data.graph.num_edges, model.maskable())
    pattern, fits = Pattern(torch.arange(data.graph.num_edges) % 3 > 0, full.weights), []
    for listed in (True, False):
        monkeypatch.setattr("acefast.train.lists_edges", lambda edges, kept, listed=listed: listed)
        masks = SoftMasks.init(pattern, 1e-5, lambda name: torch.Generator().manual_seed(1))
        fits.append(train(model, data, Schedule(12, lr=0.02, mask_lr=0.01, s1=1e-3), start, pattern, masks, 4, keep_weights=True))
    one, two = fits
    assert (one.val, one.test, one.best_epoch) == (two.val, two.test, two.best_epoch)
    assert torch.allclose(one.masks.edges, two.masks.edges, atol=1e-6) and not two.masks.edges[~pattern.edges].any()
    for name, value in one.weights.items():
        assert torch.allclose(value, two.weights[name], atol=1e-5), name
    assert not lists_edges(10**7, 10**7 // 2) and lists_edges(10**7, 10**7 // 3) and lists_edges(10**6, 10**6 - 1)


@pytest.mark.parametrize("outputs", [8, 512])
def test_nothing_left_of_a_weight(tiny, outputs):
    model = GCN(tiny.num_features, outputs, tiny.num_classes, seed=2)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    full = Pattern.full(tiny.graph.num_edges, model.maskable())
    none = full.map(torch.zeros_like)
    masks = SoftMasks.init(none, 1e-5, lambda name: torch.Generator().manual_seed(1))
    fit = train(model, tiny, Schedule(2, lr=0.1, mask_lr=0.1, s2=1e-2), start, none, masks)
    assert fit.best_epoch == 0 and not any(m.any() for m in (fit.masks.edges, *fit.masks.weights.values()))


@pytest.mark.parametrize(
    ("backbone", "share", "frozen"),
    [("gcn", 1.0, False), ("gcn", 0.5, False), ("gcn", 0.05, False), ("gcn", 0.5, True), ("gin", 0.5, False),
     ("gin", 1.0, True), ("gat", 0.5, False), ("gat", 1.0, True), ("gcn", 0.01, False), ("gcn", 0.01, True), ("gat", 0.01, False)],
)  # fmt: skip
def test_the_fast_way_is_the_straightforward_one(backbone, share, frozen):
    """Losses of 50 epochs from one start with dropout, masks, weights and the selections they give."""
    data = synthetic_citation(
        400, 60, 3, seed=2, num_edges=800, words=6.0, train_per_class=6, num_val=40, num_test=50, name="small"
    )
    hidden = 16 if share > 0.01 else 512 if backbone == "gcn" else 64  # with 512 outputs so few weights are held as lists
    model = build(backbone, data.num_features, data.num_classes, hidden=hidden, seed=2)
    assert model.blocks(data.graph, data.val)[0].num_src < 0.9 * data.num_nodes  # a part of the graph only
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(3)
    full = Pattern.full(data.graph.num_edges, model.maskable())
    pattern = full.map(lambda t: torch.rand(t.shape, generator=generator) < share)
    schedule = Schedule(50, lr=0.01, weight_decay=5e-4, mask_lr=0.01, s1=1e-3, s2=1e-3)
    fits, losses, at_work = [], [], []
    watch = dict(on_start=at_work.append, on_epochs=lambda first, vals: losses[-1].append(float(at_work[-1].loss.detach())))
    for fast in (True, False):
        losses.append([])
        masks = None if frozen else SoftMasks.init(pattern, 1e-5, lambda name: torch.Generator().manual_seed(1))
        fits.append(train(model, data, schedule, start, pattern, masks, seed=4, keep_weights=True, fast=fast, **watch))
        for name, p in model.named_parameters():
            assert torch.equal(p, fits[-1].weights[name]) and p.is_contiguous()
    one, two = fits
    assert len(losses[0]) == 50 and KeptWeights.pays(pattern.weights["layers.0.lin.weight"], data.x) == (share == 0.01)
    assert torch.allclose(*(torch.tensor(values) for values in losses), rtol=1e-5, atol=1e-6)
    assert (one.val, one.test, one.best_epoch) == (two.val, two.test, two.best_epoch)
    assert one.val_loss == pytest.approx(two.val_loss, rel=1e-5)
    for name, kept in pattern.weights.items():
        assert torch.allclose(one.weights[name][kept], two.weights[name][kept], rtol=1e-5, atol=1e-5)
    if frozen:
        assert one.masks is None and two.masks is None
        return
    for axis in ("edges", "weights"):
        for a, b, kept in zip(one.masks.axis(axis), two.masks.axis(axis), pattern.axis(axis), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-5) and not a[~kept].any()


def test_divergence_is_said(tiny):
    model, start, _ = setup(tiny)
    start["layers.0.lin.weight"] = torch.full_like(start["layers.0.lin.weight"], float("nan"))
    with pytest.raises(InputError, match="diverged"):
        train(model, tiny, Schedule(2, lr=0.1), start)


@pytest.mark.parametrize("fast", [True, False])
def test_what_is_not_evaluated_is_never_the_best_epoch(tiny, fast):
    model, start, full = setup(tiny)

    def fit(every, epochs=11):
        seen = []
        masks = SoftMasks.init(full, 1e-5, lambda name: torch.Generator().manual_seed(1))
        schedule = Schedule(epochs, lr=0.05, mask_lr=0.02, evaluate_every=every)
        on_epochs = lambda first, vals: seen.append((first, *vals))  # noqa: E731
        return train(model, tiny, schedule, start, full, masks, on_epochs=on_epochs, fast=fast), seen

    (_, every), (fourth, some), (_, none) = fit(1), fit(4), fit(100)
    assert [epoch for epoch, _ in every] == [epoch for epoch, _ in some] == list(range(11))
    assert some == [(epoch, val if epoch in (3, 7, 10) else None) for epoch, val in every]
    assert fourth.val == max(val for _, val in some if val is not None)
    assert fourth.best_epoch == next(epoch for epoch, val in some if val == fourth.val)
    assert none[:-1] == [(epoch, None) for epoch in range(10)] and none[-1] == every[-1]
