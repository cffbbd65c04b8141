import pytest
import torch

from acefast import ops
from acefast.ops import backend
from acefast.ops.triton import topk_mask as kernels
from tests.triton.cases import alive_like, check_topk, score_lists

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several blocks in a chunk and several chunks in a tensor, from a few dozen scores on."""
    monkeypatch.setattr(kernels, "BLOCK", 16)
    monkeypatch.setattr(kernels, "MAX_CHUNKS", 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", score_lists(torch.float32))
def test_selection(name, dtype):
    scores = score_lists(dtype)[name]
    total = sum(s.numel() for s in scores)
    if dtype != torch.float64:  # twice the digits
        check_topk(scores, total // 3, None, largest=True, magnitude=name != "special")
    check_topk(scores, total // 3, alive_like(scores), largest=False, magnitude=name == "list")


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("magnitude", [False, True])
def test_direction_and_key(largest, magnitude):
    scores = score_lists(torch.float16)["special"]
    check_topk(scores, 11, None, largest, magnitude)
    check_topk(scores, 11, alive_like(scores), largest, magnitude)


def test_every_k():
    scores = score_lists(torch.float16)["ties"]
    alive = alive_like(scores)
    for k in (-1, 0, 1, int(alive[0].sum()) - 1, int(alive[0].sum()), int(alive[0].sum()) + 1):
        check_topk(scores, k, alive)


def test_masks_given_are_written():
    scores = score_lists(torch.float32)["list"]
    for k in (0, 20, 999):
        out = [torch.ones_like(s, dtype=torch.bool) for s in scores]
        check_topk(scores, k, alive_like(scores), out=out)
    with backend.backend("triton"):
        assert ops.topk_mask(scores, 20, out=out) is out
    assert sum(int(part.sum()) for part in out) == 20


def test_nothing_alive_and_nothing_there():
    scores = score_lists(torch.float32)["list"]
    dead = [torch.zeros_like(s, dtype=torch.bool) for s in scores]
    for k in (0, 1):
        check_topk(scores, k, dead)
        check_topk([torch.empty(0), torch.empty(2, 0)], k)
    check_topk([torch.tensor(3.0)], 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nan", [torch.nan, -torch.nan])
def test_nan_is_reported_only_where_alive(dtype, nan):
    scores = [torch.tensor([1.0, torch.inf, 2.0, -torch.inf] * 6, dtype=dtype)]
    scores[0][9] = nan
    for magnitude in (False, True):
        keep, status = check_topk(scores, 3, None, True, magnitude)
        assert int(status) == 1 and not keep[0].any()
    alive = [torch.arange(24) != 9]
    assert int(check_topk(scores, 3, alive)[1]) == 0
    assert int(check_topk(scores, 99, None)[1]) == 3


def test_unaligned_tensors():
    storage = torch.randn(200, generator=torch.Generator().manual_seed(0))
    check_topk([storage[1:90], storage[91:]], 70, [t > -1 for t in (storage[3:92], storage[91:])])


def test_production_block_sizes(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 2048)
    monkeypatch.setattr(kernels, "MAX_CHUNKS", 2048)
    generator = torch.Generator().manual_seed(0)
    check_topk([1 + 1e-5 * torch.randn(5000, generator=generator), torch.randn(3, 77, generator=generator)], 2500)


def test_public_op_on_this_backend():
    scores = score_lists(torch.float16)["list"]
    with backend.backend("triton"):
        keep = ops.topk_mask(scores, 20)
    with backend.backend("torch"):
        expected = ops.topk_mask(scores, 20)
    assert all(torch.equal(a, b) for a, b in zip(keep, expected, strict=True))
