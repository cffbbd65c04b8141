"""Elementwise, linear and selection ops on the emulator (run by test_simt.py) or on a GPU (tests/gpu)."""

import itertools

import pytest
import torch

from acefast import CSR
from acefast.ops import reference
from tests.simt.emulated import DEVICE, check, run, unaligned

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_dropout(dtype):
    generator = torch.Generator().manual_seed(0)
    for shape, p, prepare in itertools.product(((0,), (5,), (37, 41), (4, 1000)), (0.0, 0.3, 1.0), (lambda t: t, unaligned)):
        x = prepare(torch.randn(shape, generator=generator).to(dtype))
        dy = prepare(torch.randn(shape, generator=generator).to(dtype))
        seed, step = 2**62 + 12345, 2**40 + 7
        y = run("relu_dropout", x, None, p, seed, step)
        assert torch.equal(y, reference.relu_dropout(x, None, p, seed, step))
        assert torch.equal(run("relu_dropout_bwd", dy, y, p), reference.relu_dropout_bwd(dy, y, p))


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


def check_topk(scores, k, alive=None, largest=True, magnitude=True):
    keep, status = run("topk_mask", scores, k, alive, largest, magnitude)
    expected, expected_status = reference.topk_mask(scores, k, alive, largest, magnitude)
    assert torch.equal(status, expected_status), f"status {status}, expected {expected_status}"
    for position, (a, b) in enumerate(zip(keep, expected, strict=True)):
        assert a.dtype == torch.bool and torch.equal(a, b), f"tensor {position} of k={k} largest={largest} magnitude={magnitude}"


def split(flat, sizes=(5000, 0, 1, 4096, 4097, 30)):
    """A list of tensors of these sizes, a matrix and an unaligned one among them."""
    parts = list(torch.split(flat, [*sizes, flat.numel() - sum(sizes)]))
    parts[0], parts[3] = parts[0].reshape(50, 100), unaligned(parts[3])
    return parts


SIZE = 16000
MODES = tuple(itertools.product((True, False), (True, False)))


def score_sets(dtype):
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(SIZE, generator=generator)
    info = torch.finfo(dtype)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, info.tiny, -info.tiny, info.max, info.min, info.smallest_normal / 4, 1.0, -1.0])
    return {
        "normal": normal.to(dtype),
        "fresh mask": (1 + 1e-5 * normal.double()).to(dtype),
        "few values": torch.randint(-3, 4, (SIZE,), generator=generator).to(dtype),
        "all equal": torch.full((SIZE,), -0.25, dtype=dtype),
        "special": special.to(dtype)[torch.randint(0, len(special), (SIZE,), generator=generator)],
        "denormals": (normal.double() * info.smallest_normal / 8).to(dtype),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_mask(dtype):
    generator = torch.Generator().manual_seed(4)
    for scores in score_sets(dtype).values():
        for (largest, magnitude), k in zip(MODES, (8123, 1, SIZE - 1, 4000)):
            check_topk(split(scores), k, None, largest, magnitude)
    scores, alive = split(score_sets(dtype)["few values"]), split(torch.rand(SIZE, generator=generator) < 0.4)
    living = sum(int(a.sum()) for a in alive)
    for k in (0, 1, living // 2, living, living + 1, SIZE, SIZE + 1, -1):
        check_topk(scores, k, alive, False, True)
    for k in (0, SIZE):
        check_topk(scores, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_mask_refuses_nan_where_alive(dtype):
    scores = torch.linspace(-1, 1, SIZE).to(dtype)
    scores[9000] = torch.nan
    alive = torch.ones(SIZE, dtype=torch.bool)
    check_topk(split(scores), 100, split(alive))
    check_topk(split(scores), SIZE + 5, None)
    alive[9000] = False
    for largest, magnitude in MODES:
        check_topk(split(scores), 100, split(alive), largest, magnitude)


def test_topk_mask_of_many_and_of_empty_tensors():
    generator = torch.Generator().manual_seed(5)
    many = [torch.randint(-9, 9, (n % 50,), generator=generator).float() for n in range(150)]
    total = sum(t.numel() for t in many)
    for k in (0, 7, total // 2, total):
        check_topk(many, k)
    check_topk([torch.empty(0), torch.empty(0, 3)], 0)
    check_topk([torch.empty(0)], 1)


def test_topk_mask_of_random_lists():
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.randint(0, 9000, (1 + seed % 4,), generator=generator).tolist()
        scores = [torch.randn(n, generator=generator).mul(4).round() / 4 for n in sizes]
        alive = [torch.rand(n, generator=generator) < 0.8 for n in sizes]
        living = sum(int(a.sum()) for a in alive)
        k = int(torch.randint(0, living + 1, (1,), generator=generator))
        check_topk(scores, k, alive, *MODES[seed % 4])
