"""Selection ops on the emulator (run by test_simt.py) or on a GPU (tests/gpu)."""

import itertools

import pytest
import torch

from acefast.ops import reference
from tests.simt.emulated import run, run_writing, unaligned

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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


def same_masks(actual, expected, what):
    for position, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == torch.bool and torch.equal(a, b), f"tensor {position} of {what}"


def test_topk_mask_out():
    generator = torch.Generator().manual_seed(6)
    scores, alive = split(torch.randn(SIZE, generator=generator)), split(torch.rand(SIZE, generator=generator) < 0.7)
    for k, flags in ((5000, alive), (SIZE, alive), (0, None), (77, None)):
        out = [unaligned(part) if n == 4 else part for n, part in enumerate(split(torch.rand(SIZE, generator=generator) < 0.5))]
        status, (*_, written) = run_writing("topk_mask_out", scores, k, flags, False, True, out)
        expected, expected_status = reference.topk_mask(scores, k, flags, False, True)
        assert torch.equal(status, expected_status)
        same_masks(written, expected, f"{k=}")


def check_gumbel(scores, k, tau, seed, alive=None, largest=True):
    keep, status = run("gumbel_topk", scores, k, tau, seed, alive, largest)
    expected, expected_status = reference.gumbel_topk(scores, k, tau, seed, alive, largest)
    assert torch.equal(status, expected_status)
    same_masks(keep, expected, f"{k=} {tau=} {seed=} {largest=}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gumbel_topk(dtype):
    generator = torch.Generator().manual_seed(9)
    sets, alive = score_sets(dtype), split(torch.rand(SIZE, generator=generator) < 0.4)
    for k, tau, seed, largest in ((8123, 0.5, 2**62 + 11, True), (1, 0.0, 3, False), (SIZE - 1, 1e-3, 0, False)):
        check_gumbel(split(sets["fresh mask"]), k, tau, seed, None, largest)
    living = sum(int(a.sum()) for a in alive)
    for k in (0, living // 3, living, living + 1, -1):
        check_gumbel(split(sets["normal"]), k, 2.0, k + 5, alive)
    nan = sets["normal"].clone()
    nan[9000] = torch.nan
    check_gumbel(split(nan), 100, 1.0, 1)
    check_gumbel([torch.empty(0, dtype=dtype)], 0, 1.0, 1)


def test_gumbel_topk_draws_the_noise_to_the_bit():
    """Scores that cancel the noise leave keys of 0, or of a rounding or two: one differing bit changes their order."""
    for tau, seed in ((1.0, 2023), (0.7, 2**40)):
        scores = reference.gumbel_noise(0, SIZE, seed, 0, "cpu") * -tau
        for k in (SIZE // 3, 2 * SIZE // 3):
            check_gumbel(split(scores), k, tau, seed)
    sizes = [n % 7 for n in range(200)]
    check_gumbel(list(torch.split(scores, [*sizes, SIZE - sum(sizes)])), SIZE // 2, tau, seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exchange(dtype):
    generator = torch.Generator().manual_seed(10)
    flags = torch.rand(SIZE, generator=generator) < 0.7
    keep, kept = split(flags), score_sets(dtype)["normal"]
    pruned = torch.randn(SIZE, generator=generator).to(torch.float32 if dtype == torch.float64 else dtype)
    kept[~flags], pruned[flags] = torch.nan, torch.nan  # scores of the other set are not read
    removed = int((~flags).sum())
    for k, tau in ((1000, 0.3), (0, 1.0), (removed, 0.0), (removed + 1, 1.0), (SIZE, 1.0)):
        args = keep, split(kept), split(pruned), k, tau, 2**40 + k
        actual, expected = run("exchange", *args), reference.exchange(*args)
        assert torch.equal(actual[3], expected[3])
        for name, a, b in zip(("keep", "erased", "mined"), actual, expected, strict=False):
            same_masks(a, b, f"{name} {k=}")
