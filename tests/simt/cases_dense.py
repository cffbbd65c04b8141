"""Elementwise and linear ops and the optimiser on the emulator (run by test_simt.py) or on a GPU (tests/gpu)."""

import itertools

import pytest
import torch

from acefast import CSR
from acefast.ops import reference
from tests.inputs import assert_close
from tests.simt.emulated import DEVICE, check, run, run_writing, unaligned

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_dropout(dtype):
    generator = torch.Generator().manual_seed(0)
    for shape, p, prepare in itertools.product(((0,), (5,), (37, 41), (4, 1000)), (0.0, 0.3, 1.0), (lambda t: t, unaligned)):
        x = prepare(torch.randn(shape, generator=generator).to(dtype))
        dy = prepare(torch.randn(shape, generator=generator).to(dtype))
        seed, step = 2**62 + 12345, 2**40 + 7
        y = run("relu_dropout", x, None, p, seed, step, None)
        assert torch.equal(y, reference.relu_dropout(x, None, p, seed, step, None))
        assert torch.equal(y, run("relu_dropout", x, None, p, seed, 0, torch.tensor([step])))
        assert torch.equal(run("relu_dropout_bwd", dy, y, p), reference.relu_dropout_bwd(dy, y, p))


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_dropout_of_some_rows(dtype):
    generator = torch.Generator().manual_seed(7)
    for shape, p, prepare in itertools.product(((0, 4), (3, 0), (50,), (37, 41), (40, 64)), (0.3, 1.0), (lambda t: t, unaligned)):
        x = prepare(torch.randn(shape, generator=generator).to(dtype))
        rows = torch.randint(0, 10**6, shape[:1], generator=generator)
        rows[: shape[0] // 2] += 2**40  # numbers of elements above 2^32
        y = run("relu_dropout", x, rows, p, 2**62 + 12345, 0, torch.tensor([2**40 + 7]))
        assert torch.equal(y, reference.relu_dropout(x, rows, p, 2**62 + 12345, 2**40 + 7, None))
    whole = torch.randn(30, 9, generator=generator).to(dtype)
    rows = torch.randperm(30, generator=generator)[:11]
    some, every = (run("relu_dropout", *x, 0.5, 3, 4, None) for x in ((whole[rows], rows), (whole, None)))
    assert torch.equal(some, every[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_elu_dropout(dtype):
    generator = torch.Generator().manual_seed(8)
    for shape, p, prepare in itertools.product(((0,), (5,), (37, 41), (40, 64)), (0.0, 0.3, 1.0), (lambda t: t, unaligned)):
        x, dy = (prepare((3 * torch.randn(shape, generator=generator)).to(dtype)) for _ in range(2))
        x.view(-1)[::7] = 0
        for rows in (None, torch.randint(0, 2**40, shape[:1], generator=generator)):
            y = run("elu_dropout", x, rows, p, 3, 2**40 + 7, None)
            expected = reference.elu_dropout(x, rows, p, 3, 2**40 + 7, None)
            assert torch.equal(torch.signbit(y), torch.signbit(expected)) and torch.equal(y == 0, expected == 0)
            assert_close(y, reference.elu_dropout(x.double(), rows, p, 3, 2**40 + 7, None), dtype)
            assert_close(run("elu_dropout_bwd", dy, y, p), reference.elu_dropout_bwd(dy.double(), y.double(), p), dtype)


def parameters(outputs, inputs, dtype, chosen, generator):
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def random(*shape):
        return torch.randn(shape, generator=generator)

    weight = random(outputs, inputs).to(dtype)
    mask = random(outputs, inputs).to(acc) if "mask" in chosen else None
    bias = random(outputs).to(acc) if "bias" in chosen else None
    keep = random(outputs, inputs) < 0.3 if "keep" in chosen else None
    if mask is not None and keep is not None:
        mask[~keep] = torch.nan
    return weight, mask, bias, keep


CHOICES = (("mask", "bias", "keep"), (), ("mask",), ("keep",), ("bias",))


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_linear(dtype):
    generator = torch.Generator().manual_seed(1)
    for (rows, inputs, outputs), chosen in itertools.product(((50, 33, 7), (1, 128, 130), (0, 4, 3), (3, 0, 2)), CHOICES):
        x = torch.randn(rows, inputs, generator=generator).to(dtype)
        dy = torch.randn(rows, outputs, generator=generator).to(dtype)
        weight, mask, bias, keep = parameters(outputs, inputs, dtype, chosen, generator)
        check("masked_linear", x, weight, mask, bias, keep, False, what=str(chosen))
        for need_dx, need_dw, all_weights in ((True, True, False), (False, True, True), (True, False, False)):
            check("masked_linear_bwd", dy, x, weight, mask, keep, need_dx, need_dw, all_weights, what=str(chosen))


def test_masked_linear_is_left_alone_by_autocast():
    generator = torch.Generator().manual_seed(6)
    x, dy = torch.randn(20, 16, generator=generator), torch.randn(20, 5, generator=generator)
    weight, mask, bias, keep = parameters(5, 16, torch.float32, CHOICES[0], generator)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = run("masked_linear", x, weight, mask, bias, keep, False)
        dx, dw = run("masked_linear_bwd", dy, x, weight, mask, keep, True, True, False)
    assert torch.equal(y, run("masked_linear", x, weight, mask, bias, keep, False))
    assert all(map(torch.equal, (dx, dw), run("masked_linear_bwd", dy, x, weight, mask, keep, True, True, False)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_linear_csr(dtype):
    generator = torch.Generator().manual_seed(2)
    for (rows, inputs, outputs), chosen in zip(((50, 33, 7), (700, 40, 33), (600, 3, 64), (0, 4, 3), (3, 5, 0), (4, 0, 5)), CHOICES * 2):
        dense = torch.randn(rows, inputs, generator=generator).to(dtype)
        dense[torch.rand(rows, inputs, generator=generator) < (0.1 if inputs == 3 else 0.8)] = 0
        x = CSR.from_dense(dense)
        csr = (x.rowptr, x.col, x.value, *x.transpose_arrays())
        dy = torch.randn(rows, outputs, generator=generator).to(dtype)
        weight, mask, bias, keep = parameters(outputs, inputs, dtype, chosen, generator)
        check("masked_linear_csr", *csr, weight, mask, bias, keep, False, what=str(chosen))
        for all_weights in (False, True):
            check("masked_linear_csr_bwd", *csr, dy, weight, mask, keep, all_weights, what=str(chosen))


def adam_arguments(dtype, sizes, masked, kept, place, weighted, generator):
    """masked_adam's arguments at step 3, moments and all; NaN where nothing may be read."""

    def random(n):
        return torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)

    theta, mask = [random(n) for n in sizes], [random(n) for n in sizes]
    theta_mean, mask_mean = [random(n) for n in sizes], [random(n) for n in sizes]
    theta_square, mask_square = [random(n).abs() for n in sizes], [random(n).abs() for n in sizes]
    keep = [torch.rand(n, generator=generator) < 0.6 for n in sizes] if kept else None
    if len(sizes) > 1:
        mask_mean[1] = unaligned(mask_mean[1])
    for t in theta:
        t[: t.numel() // 9] = 0.0  # where an L1 subgradient is 0
    grad, places, larger = [random(n) for n in sizes], None, sizes
    if kept:
        for g, k in zip(grad, keep, strict=True):
            g[~k] = torch.nan
    if place is not None:
        larger = [2 * n + 3 for n in sizes]
        places = [torch.randperm(m, generator=generator)[:n].to(place) for m, n in zip(larger, sizes, strict=True)]
        spread = [torch.full((m,), torch.nan, dtype=dtype) for m in larger]
        for whole, at, g in zip(spread, places, grad, strict=True):
            whole[at.long()] = g
        grad = spread
    weight = [torch.full((m,), 7.0, dtype=dtype) for m in larger] if weighted else []
    of_mask = (mask, mask_mean, mask_square) if masked else ([], [], [])
    step = torch.tensor([3])
    theta_settings, mask_settings = (1e-2, 0.9, 0.999, 1e-8, 1e-3, 1e-4), (2e-3, 0.8, 0.99, 1e-6, 0.0, 3e-2)
    return [
        grad, places, keep, theta, of_mask[0], theta_mean, theta_square, *of_mask[1:], weight, step, theta_settings, mask_settings
    ]  # fmt: skip


WRITTEN = {"theta": 3, "mask": 4, "theta_mean": 5, "theta_square": 6, "mask_mean": 7, "mask_square": 8, "weight": 9}


def check_masked_adam(args, steps=2):
    """Steps on the device against the same in float64; what keep or place leaves out keeps its bits, weight 0 where keep is
    false."""
    dtype = args[3][0].dtype

    def wide(value):
        if isinstance(value, list):
            return [wide(part) for part in value]
        if not isinstance(value, torch.Tensor):
            return value
        return value.double().clone() if value.is_floating_point() else value.clone()

    before, expected = args, wide(args)
    for _ in range(steps):
        _, args = run_writing("masked_adam", *args)
        reference.masked_adam(*expected)
    assert torch.equal(args[10], torch.tensor([3 + steps]))
    for name, position in WRITTEN.items():
        for n, (a, b, old) in enumerate(zip(args[position], expected[position], before[position], strict=True)):
            assert a.dtype == dtype
            assert_close(a, b, dtype, f"{name}[{n}]")
            if before[2] is not None and name != "weight":
                assert torch.equal(a[~before[2][n]], old[~before[2][n]]), f"{name}[{n}] where keep is false"
    for n, (a, old) in enumerate(zip(args[9], before[9], strict=True)):
        named = torch.arange(a.numel()) if before[1] is None else before[1][n].long()
        others = torch.ones(a.shape, dtype=torch.bool).index_fill_(0, named, False)
        assert torch.equal(a[others], old[others]), f"weight[{n}] where nothing is placed"
        if before[2] is not None:
            assert not a[named[~before[2][n]]].any(), f"weight[{n}] where keep is false"


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_masked_adam(dtype):
    generator = torch.Generator().manual_seed(8)
    choices = itertools.product((True, False), (True, False), (None, torch.int32, torch.int64), (True, False))
    for masked, kept, place, weighted in choices:
        check_masked_adam(adam_arguments(dtype, (35, 67, 0, 1), masked, kept, place, weighted, generator))
    check_masked_adam(adam_arguments(dtype, (9000,), True, True, None, True, generator))
    check_masked_adam(adam_arguments(dtype, (4100, 4096), True, False, torch.int32, True, generator))
    check_masked_adam(adam_arguments(dtype, [n % 13 for n in range(60)], True, True, None, True, generator), steps=1)
    _, args = run_writing("masked_adam", *adam_arguments(dtype, (0,), True, False, None, False, generator))
    assert args[10].item() == 4
