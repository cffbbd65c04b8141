"""The Triton kernels compiled for the GPU at hand: the cases that the interpreter runs (tests/triton/cases.py), on "cuda"."""

import pytest
import torch

pytest.importorskip("triton")

from acefast.ops import reference
from tests.inputs import graphs
from tests.triton import cases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GRAPHS = graphs()
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NEEDS = [(True, True), (True, False), (False, True)]


@pytest.mark.parametrize("features", [1, 33, 128, 300])
@pytest.mark.parametrize("name", GRAPHS)
def test_spmm(name, features):
    cases.check_spmm(GRAPHS[name], features, torch.float32, device="cuda")
    for need in NEEDS:
        cases.check_spmm_bwd(GRAPHS[name], features, torch.float32, need=need, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["hub", "bipartite"])
def test_spmm_with_heads_and_selections(name, dtype):
    for heads, selection in ((None, True), (4, False), (4, True)):
        cases.check_spmm(GRAPHS[name], 16, dtype, heads=heads, selection=selection, device="cuda")
        cases.check_spmm_bwd(GRAPHS[name], 16, dtype, heads=heads, selection=selection, device="cuda")


@pytest.mark.parametrize("mask", [None, "edge", "head"])
@pytest.mark.parametrize("name", GRAPHS)
def test_gat(name, mask):
    for mask_on_logit, dropout, selection in ((False, 0.0, False), (True, 0.4, False), (False, 0.4, True)):
        cases.check_gat(
            GRAPHS[name], 8, 16, torch.float32, mask=mask, keep=True, mask_on_logit=mask_on_logit, dropout=dropout,
            selection=selection, device="cuda",
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gat_in_every_dtype(dtype):
    for heads, features in ((1, 7), (3, 33), (8, 64)):
        cases.check_gat(GRAPHS["hub"], heads, features, dtype, mask="edge", device="cuda")


@pytest.mark.parametrize("features", [1, 33, 128])
@pytest.mark.parametrize("name", GRAPHS)
def test_gen(name, features):
    for aggr in (reference.SOFTMAX, reference.SOFTMAX_SG):
        for removed, selection in ((False, False), (True, False), (False, True)):
            cases.check_gen(
                GRAPHS[name], features, torch.float32, aggr=aggr, removed=removed, selection=selection, device="cuda"
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gen_in_every_dtype(dtype):
    cases.check_gen(GRAPHS["hub"], 64, dtype, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk(dtype):
    for name, scores in cases.score_lists(dtype, scale=500).items():
        total = sum(s.numel() for s in scores)
        for k in (0, 1, total // 3, total):
            cases.check_topk(scores, k, device="cuda")
        alive = cases.alive_like(scores)
        living = sum(int(a.sum()) for a in alive)
        out = [torch.ones(s.shape, dtype=torch.bool, device="cuda") for s in scores]
        for given in (None, out):
            cases.check_topk(
                scores, living // 2, alive, largest=False, magnitude=name != "ties", device="cuda", out=given
            )
