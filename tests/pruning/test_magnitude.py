"""global_magnitude_: which weights go, on any module, and what is refused with nothing changed."""

import math

import pytest
import torch
from torch import nn

from acefast.errors import InputError
from acefast.pruning import global_magnitude_


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 11), nn.LayerNorm(11), nn.Conv2d(2, 3, 3), nn.Linear(11, 5)).to(dtype)


def kept_after(weights, alive, removed):
    """The plain way: all magnitudes sorted, the last `removed` of the alive ones go; flat bool."""
    flat = torch.cat([w.flatten().double() for w in weights]).abs()
    order = [e for e in torch.sort(flat, descending=True, stable=True).indices.tolist() if alive[e]]
    keep = torch.zeros(flat.numel(), dtype=torch.bool)
    keep[order[: len(order) - removed]] = True
    return keep


def flat(masks):
    return torch.cat([mask.flatten() for mask in masks.values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.999, 1.0])
def test_removes_exactly_the_floor_of_the_least(dtype, sparsity):
    model = small_model(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = global_magnitude_(model, sparsity)
    assert list(masks) == ["0.weight", "2.weight", "3.weight"]
    total = flat(masks).numel()
    expected = kept_after([before[name] for name in masks], [True] * total, math.floor(round(sparsity * total, 6)))
    assert torch.equal(flat(masks), expected)
    for name, p in model.named_parameters():
        left = before[name] * masks[name] if name in masks else before[name]
        assert torch.equal(p, left) and p.dtype == dtype and p.requires_grad and p.grad_fn is None


def test_of_equal_magnitudes_the_first_stay():
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(2, 2)])
    for layer, values in zip(model, ([[1, -1, 1], [2, -1, 1]], [[-1, 3], [1, 1]]), strict=True):
        layer.weight.data = torch.tensor(values, dtype=torch.float32)
    global_magnitude_(model, 0.5)
    assert model[0].weight.tolist() == [[1, -1, 1], [2, 0, 0]]
    assert model[1].weight.tolist() == [[0, 3], [0, 0]]


def test_layer_scope_removes_the_same_share_of_each():
    model = small_model()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = global_magnitude_(model, 0.3, scope="layer")
    for name, mask in masks.items():
        n = mask.numel()
        assert torch.equal(mask.flatten(), kept_after([weights[name]], [True] * n, 3 * n // 10))


def test_repeated_pruning_counts_what_is_left_and_revives_nothing():
    model = small_model()
    masks = global_magnitude_(model, 0.2)
    remaining = int(flat(masks).sum())
    for _ in range(6):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape))  # as training does; removed weights become something else
        weights = [p.detach().clone() for name, p in model.named_parameters() if name in masks]
        earlier = {name: mask.clone() for name, mask in masks.items()}
        after = global_magnitude_(model, 0.2, keep=masks)
        assert all(torch.equal(masks[name], earlier[name]) for name in masks)
        expected = kept_after(weights, flat(masks).tolist(), remaining // 5)
        assert torch.equal(flat(after), expected)
        assert all(bool((model.get_parameter(name)[~mask] == 0).all()) for name, mask in after.items())
        masks, remaining = after, remaining - remaining // 5


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_masks_are_reused_where_out_says(scope):
    models = [small_model(), small_model()]
    masks = [global_magnitude_(model, 0.2, scope=scope) for model in models]
    again = global_magnitude_(models[0], 0.5, keep=masks[0], scope=scope)
    reused = global_magnitude_(models[1], 0.5, keep=masks[1], out=masks[1], scope=scope)
    for name, mask in again.items():
        assert reused[name] is masks[1][name] and torch.equal(reused[name], mask)
        assert torch.equal(*(model.get_parameter(name) for model in models))


def test_names_choose():
    model = small_model()
    assert list(global_magnitude_(model, 0.5, ["3.weight", "0.bias"])) == ["3.weight", "0.bias"]
    assert list(global_magnitude_(model, 0.5, lambda name, p: p.dim() == 1)) == [
        "0.bias", "1.weight", "1.bias", "2.bias", "3.bias",
    ]  # fmt: skip
    masks = global_magnitude_(model, 0.5, ["2.weight"])
    assert list(global_magnitude_(model, 0.5, keep=masks)) == ["2.weight"]


def test_a_shared_parameter_counts_once():
    model = nn.ModuleDict({"encode": nn.Embedding(6, 4), "decode": nn.Linear(4, 6), "other": nn.Linear(4, 4)})
    model["decode"].weight = model["encode"].weight
    masks = global_magnitude_(model, 0.25)
    assert list(masks) == ["encode.weight", "other.weight"] and int((~flat(masks)).sum()) == 10
    assert int((model["decode"].weight == 0).sum()) == int((~masks["encode.weight"]).sum())
    assert list(global_magnitude_(model, 0.25, ["decode.weight", "encode.weight"])) == ["decode.weight"]


def test_infinite_weights_and_parameters_of_any_layout():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.turned = nn.Parameter(torch.randn(5, 6).t())
            self.strided = nn.Parameter(torch.randn(8, 8)[::2, 1::3])
            self.empty = nn.Parameter(torch.zeros(0, 3))
            self.scalar = nn.Parameter(torch.tensor(-torch.inf))
            self.large = nn.Parameter(torch.full((3, 2), torch.inf))

    model = Odd()
    before = [p.detach().clone() for p in model.parameters()]
    masks = global_magnitude_(model, 0.9, lambda name, p: True)
    total = flat(masks).numel()
    assert torch.equal(flat(masks), kept_after(before, [True] * total, 9 * total // 10))
    assert not masks["large"].all(), "infinities were removed too"
    for p, b, mask in zip(model.parameters(), before, masks.values(), strict=True):
        assert torch.equal(p, b.where(mask, torch.zeros(())))


def test_chunks_cover_large_parameters():
    model = nn.Linear(700, 1100)
    before = model.weight.detach().clone()
    masks = global_magnitude_(model, 0.7)
    assert torch.equal(model.weight, before * masks["weight"]) and int(masks["weight"].sum()) == 770_000 * 3 // 10


def test_mixed_dtypes_compare_in_the_one_that_holds_all():
    model = nn.ModuleList([nn.Linear(9, 9).half(), nn.Linear(9, 9).bfloat16(), nn.Linear(9, 9)])
    before = [layer.weight.detach().clone() for layer in model]
    masks = global_magnitude_(model, 0.5)
    assert torch.equal(flat(masks), kept_after(before, [True] * 243, 121))
    assert [layer.weight.dtype for layer in model] == [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_nan_is_refused_with_nothing_changed(scope):
    model = small_model()
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(InputError, match="NaN"):
        global_magnitude_(model, 0.5, scope=scope)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(sparsity=1.5), "in \\[0, 1\\]"),
        (dict(sparsity=float("nan")), "in \\[0, 1\\]"),
        (dict(sparsity=True), "in \\[0, 1\\]"),
        (dict(names=["0.weigth"]), "no parameter '0.weigth'"),
        (dict(names=[]), "no parameter to prune"),
        (dict(names=["0.weight", "steps"]), "steps must be float32"),
        (dict(scope="row"), "scope must be one of global, layer"),
        (dict(keep={}), "no parameter to prune"),
        (dict(keep={"0.weight": torch.ones(2, 2, dtype=torch.bool)}), "alive\\[0\\]"),
        (dict(keep={"0.weight": torch.ones(11, 7) > 0}, names=["0.weight", "3.weight"]), "keep must hold a mask"),
        (dict(out={}, names=["0.weight"]), "out must hold a mask"),
        (dict(names=["0.weight", "far"]), "on one device"),
    ],
)
def test_what_cannot_be_is_refused_with_nothing_changed(arguments, message):
    model = small_model()
    model.steps = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
    model.far = nn.Parameter(torch.ones(3, 3, device="meta"))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(InputError, match=message) as error:
        global_magnitude_(model, **{"sparsity": 0.5, **arguments})
    assert "\n" not in str(error.value)
    assert all(a.is_meta or torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
