"""masked_adam: the product rule and torch.optim.Adam on both factors, in one pass."""

import pytest
import torch

from acefast import InputError, backend, ops
from acefast.ops import AdamSettings

SHAPES = [(37, 29), (0, 3), (1_301,), (1,)]
PLAIN = AdamSettings(), AdamSettings(lr=2e-3)
FULL = (
    AdamSettings(lr=1e-2, weight_decay=5e-3, l1=1e-3),
    AdamSettings(lr=3e-2, beta1=0.8, beta2=0.99, eps=1e-6, weight_decay=1e-2, l1=2e-3),
)
STEPS = 100
VARIANTS = {
    "plain": dict(settings=PLAIN),
    "decay and l1": dict(settings=FULL),
    "keep": dict(settings=FULL, keep=True),
    "place": dict(settings=FULL, place=torch.int64),
    "place, keep": dict(settings=FULL, place=torch.int32, keep=True),
    "no mask": dict(settings=FULL[:1]),
    "no mask, place, keep": dict(settings=FULL[:1], place=torch.int64, keep=True),
    "no weight": dict(settings=PLAIN, weight=False),
}


class Problem:
    """What masked_adam takes, with random values; a factor is (values, means, squares), lists of tensors. With `keep` about half
    of the elements exist; with `place` (a dtype) theta's elements are some of parameters half as large again."""

    def __init__(self, dtype, settings, keep=False, place=None, weight=True, shapes=SHAPES):
        self.draw = torch.Generator().manual_seed(3)
        self.dtype, self.settings = dtype, settings
        theta = [self.randn(shape) for shape in shapes]
        self.factors = [(theta if n == 0 else list(map(torch.ones_like, theta)),) for n in range(len(settings))]
        self.factors = [(*factor, *(list(map(torch.zeros_like, theta)) for _ in range(2))) for factor in self.factors]
        self.step = torch.zeros(1, dtype=torch.int64)
        self.keep = [torch.rand(p.shape, generator=self.draw) < 0.5 for p in theta] if keep else None
        self.spread = [(p.numel() * 3 // 2,) if place else p.shape for p in theta]  # the shapes of grad and weight
        self.place = place and [
            torch.randperm(size, generator=self.draw)[: p.numel()].view_as(p).to(place)
            for (size,), p in zip(self.spread, theta, strict=True)
        ]
        self.weight = [torch.full(shape, torch.nan, dtype=dtype) for shape in self.spread] if weight else None

    def randn(self, shape):
        return torch.randn(shape, generator=self.draw, dtype=torch.float64).to(self.dtype)

    def grad(self):
        return [self.randn(shape) for shape in self.spread]

    def take(self, grad):
        theta, *moments = self.factors[0]
        mask, *mask_moments = self.factors[1] if len(self.factors) == 2 else (None,)
        ops.masked_adam(
            grad, theta, mask, tuple(moments), tuple(mask_moments) or None, self.step, *self.settings, keep=self.keep,
            place=self.place, weight=self.weight,
        )  # fmt: skip

    def parts(self):
        """All lists of tensors like theta that a step updates."""
        return [part for factor in self.factors for part in factor]

    def existing(self, tensors):
        """The elements that exist of tensors like theta, flat."""
        return [t[k] for t, k in zip(tensors, self.keep, strict=True)] if self.keep else [t.flatten() for t in tensors]

    def placed(self, tensors):
        """Of tensors like grad the elements that theta has."""
        return [t[at.long()] for t, at in zip(tensors, self.place, strict=True)] if self.place else tensors


def by_torch(problem, grads):
    """`parts()` after the steps, of the elements that exist: the product rule and one torch.optim.Adam per factor."""
    factors = [[p.clone() for p in problem.existing(values)] for values, *_ in problem.factors]
    optimisers = [
        torch.optim.Adam(factor, s.lr, (s.beta1, s.beta2), s.eps, s.weight_decay)
        for factor, s in zip(factors, problem.settings, strict=True)
    ]
    for grad in grads:
        for n, g in enumerate(problem.existing(problem.placed(grad))):
            own = [factor[n] for factor in factors]
            others = own[::-1] if len(own) == 2 else [1.0]
            for p, other, s in zip(own, others, problem.settings, strict=True):
                p.grad = g * other + s.l1 * p.sign()
        for optimiser in optimisers:
            optimiser.step()
    parts = []
    for factor, optimiser in zip(factors, optimisers, strict=True):
        parts += [factor, *([optimiser.state[p][name] for p in factor] for name in ("exp_avg", "exp_avg_sq"))]
    return parts


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm()) <= (1e-6 if b.dtype == torch.float32 else 1e-14) * float(b.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_product_rule_and_adam_on_both_factors(each_backend, variant, dtype):
    problem = Problem(dtype, **VARIANTS[variant])
    before = [[t.clone() for t in part] for part in problem.parts()]
    grads = [problem.grad() for _ in range(STEPS)]
    expected = by_torch(problem, grads)
    for grad in grads:
        problem.take(grad)
    assert problem.step.item() == STEPS
    for part, expected_part, old in zip(problem.parts(), expected, before, strict=True):
        assert_close(problem.existing(part), expected_part)
        for t, start, keep in zip(part, old, problem.keep or [], strict=bool(problem.keep)):
            assert torch.equal(t[~keep], start[~keep]), "an element that does not exist has changed"
    if problem.weight:
        values = [factor[0] for factor in problem.factors]
        product = [torch.stack(pair).prod(0) for pair in zip(*values, strict=True)]
        weight = problem.placed(problem.weight)
        assert_close(problem.existing(weight), problem.existing(product))
        assert all(bool((w[~keep] == 0).all()) for w, keep in zip(weight, problem.keep or []))
        for w, p in zip(problem.weight, problem.factors[0][0], strict=True):
            assert int(w.isnan().sum()) == w.numel() - p.numel(), "a place that is not theta's was written"


@pytest.mark.parametrize("variant", ["decay and l1", "place, keep", "no mask"])
def test_every_thread_count_gives_the_same_bits_and_the_reference_agrees(variant):
    before = torch.get_num_threads()
    found = []
    try:
        for name, threads in (("torch", before), ("auto", 1), ("auto", 2)):
            torch.set_num_threads(threads)
            problem = Problem(torch.float32, **VARIANTS[variant], shapes=[(40_001,), (3, 5), (257, 129)])
            with backend(name):
                for _ in range(5):
                    problem.take(problem.grad())
            found.append([t for part in (*problem.parts(), problem.placed(problem.weight)) for t in part])
    finally:
        torch.set_num_threads(before)
    reference, one, two = found
    assert all(map(torch.equal, one, two))
    assert_close(one, reference)


def test_zero_has_no_l1_gradient_and_removed_elements_may_hold_anything(each_backend):
    theta = torch.tensor([0.0, -0.0, torch.nan, 3.0])
    mask, grad = torch.ones(4), torch.tensor([0.0, 0.0, torch.nan, torch.inf])
    of_theta, of_mask = ([[torch.zeros(4)], [torch.zeros(4)]] for _ in range(2))
    weight, step = torch.full((4,), 9.0), torch.zeros(1, dtype=torch.int64)
    keep = torch.tensor([True, True, False, False])
    settings = AdamSettings(l1=1.0), AdamSettings(l1=0.5)
    ops.masked_adam([grad], [theta], [mask], of_theta, of_mask, step, *settings, keep=[keep], weight=[weight])
    assert theta[[0, 1, 3]].tolist() == [0, 0, 3] and theta[2].isnan() and weight.tolist() == [0] * 4
    assert mask.tolist() == pytest.approx([0.999, 0.999, 1, 1])
    assert of_theta[0][0].tolist() == [0] * 4 and of_mask[0][0].tolist() == pytest.approx([0.05, 0.05, 0, 0])


@pytest.mark.parametrize("variant", ["place, keep", "no mask", "no weight"])
def test_opcheck(variant):
    numbers = [1e-2, 0.9, 0.999, 1e-8, 0.0, 0.0]
    problem = Problem(torch.float32, **VARIANTS[variant], shapes=[(4, 3), (5,)])
    (theta, *moments), (mask, *mask_moments) = (*problem.factors, ([], [], []))[:2]
    lists = problem.grad(), problem.place, problem.keep, theta, mask, *moments, *mask_moments, problem.weight or []
    torch.library.opcheck(torch.ops.acefast.masked_adam, (*lists, problem.step, numbers, numbers))


def test_refusals(each_backend):
    def like(*sizes, dtype=torch.float32):
        return [torch.ones(size, dtype=dtype) for size in sizes or ((2, 3), (4,))]

    given = dict(
        grad=like(), theta=like(), mask=like(), theta_moments=(like(), like()), mask_moments=(like(), like()),
        step=torch.zeros(1, dtype=torch.int64), theta_settings=AdamSettings(), mask_settings=AdamSettings(),
    )  # fmt: skip
    turned = torch.ones(3, 2).t()
    for changes, words in (
        (dict(theta=[]), "theta must be a non-empty list of tensors"),
        (dict(theta=torch.ones(3)), "theta must be a non-empty list of tensors"),
        (dict(theta=[torch.ones(2, 3), None]), "theta must be a non-empty list of tensors"),
        (dict(theta=like(dtype=torch.float16)), "theta must be float32 or float64, got torch.float16"),
        (dict(theta=[torch.ones(2, 3), torch.ones(4).double()]), r"theta\[1\] must be torch.float32, got torch.float64"),
        (dict(theta=[turned, torch.ones(4)]), r"theta\[0\] must be contiguous, got strides \(1, 2\)"),
        (dict(mask=None), "mask, mask_moments and mask_settings must be given together"),
        (dict(mask_settings=None), "mask, mask_moments and mask_settings must be given together"),
        (dict(mask_moments=None), "mask, mask_moments and mask_settings must be given together"),
        (dict(mask=like((2, 3))), "mask must have 2 tensors like theta, got 1"),
        (dict(grad=like((2, 3), (5,))), r"grad\[1\] must have shape \[4\], got \[5\]"),
        (dict(grad=[torch.ones(2, 3), None]), r"grad\[1\] must be a tensor, got NoneType"),
        (dict(weight=like((2, 3), (4, 1))), r"weight\[1\] must have shape \[4\], got \[4, 1\]"),
        (dict(theta_moments=(like(), like((3, 2), (4,)))), r"theta_moments\[1\]\[0\] must have shape \[2, 3\]"),
        (dict(mask_moments=(like(dtype=torch.float64), like())), r"mask_moments\[0\]\[0\] must be torch.float32"),
        (dict(keep=like()), r"keep\[0\] must be torch.bool, got torch.float32"),
        (dict(step=torch.zeros(1)), "step must be torch.int64"),
        (dict(step=torch.zeros(2, dtype=torch.int64)), r"step must have shape \[1\], got \[2\]"),
        (dict(place=like()), "place must hold int32 or int64 tensors, got torch.float32"),
        (dict(place=[]), "place must hold int32 or int64 tensors"),
        (dict(place=like((2, 3), (5,), dtype=torch.int64)), r"place\[1\] must have shape \[4\], got \[5\]"),
        (dict(place=like(dtype=torch.int64), grad=like((9,))), "grad must have 2 tensors like theta, got 1"),
        (dict(place=like(dtype=torch.int64), weight=like((9,), (9,))), r"weight\[0\] must have shape \[2, 3\], got \[9\]"),
        (dict(theta=[torch.ones(2, 3), torch.ones(4, device="meta")]), r"theta\[1\] .*cpu"),
    ):
        with pytest.raises(InputError, match="masked_adam: " + words) as error:
            ops.masked_adam(**given | changes)
        assert "\n" not in str(error.value)
    assert all(bool((t == 1).all()) for t in given["theta"]) and given["step"].item() == 0
    for name in ("lr", "eps", "weight_decay", "l1"):
        with pytest.raises(InputError, match=f"AdamSettings: {name} must be a finite number >= 0, got -1"):
            AdamSettings(**{name: -1.0})
    for name in ("beta1", "beta2"):
        with pytest.raises(InputError, match=rf"AdamSettings: {name} must lie in \[0, 1\), got 1.0"):
            AdamSettings(**{name: 1.0})
