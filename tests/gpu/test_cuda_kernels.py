"""The cases of the SIMT emulator on a real GPU, and what only a GPU can show: streams and graph capture."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from tests.inputs import graphs
from tests.simt.cases_attention import *  # noqa: F403
from tests.simt.cases_dense import *  # noqa: F403
from tests.simt.cases_graph import *  # noqa: F403

native = torch.ops.acefast_native


def test_ops_follow_the_current_stream_and_capture_into_a_graph():
    graph = graphs()["hub"].to("cuda")
    x, dy = torch.randn(40, 64, device="cuda"), torch.randn(40, 64, device="cuda")
    mask = torch.rand(graph.num_edges, device="cuda")

    def step():
        keep, status = native.topk_mask([mask], graph.num_edges // 2, None, True, True)
        y = native.spmm(*graph.arrays, x, None, mask, keep[0], None, None, False)
        gradients = native.spmm_bwd(*graph.arrays, dy, x, None, mask, keep[0], None, None, True, True, False)
        return keep[0], status, y, *gradients[:2]

    expected = [t.clone() for t in step()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_side = step()
    torch.cuda.current_stream().wait_stream(side)
    assert all(map(torch.equal, on_side, expected))

    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = step()
    mask.copy_(torch.rand_like(mask))
    captured.replay()
    assert all(map(torch.equal, results, step()))
