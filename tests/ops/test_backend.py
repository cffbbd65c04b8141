"""Which backend serves what, and what happens when a binary does not load."""

import os
import subprocess
import sys

import pytest
import torch

import acefast
from acefast import Graph, InputError, ops
from acefast.ops import backend, reference

WANTED = os.environ.get("ACEFAST_BUILD", "auto") != "none"


@pytest.mark.skipif(not WANTED, reason="ACEFAST_BUILD=none asks for an install without native code")
def test_native_kernels_serve_the_cpu():
    assert backend.loaded().get("cpu"), backend.report()["not_loaded"]
    served = {op: backend.serving(op, "cpu") for op in backend.SCHEMAS}
    assert served == dict.fromkeys(backend.SCHEMAS, "native")


def test_explicit_choice_fails_loudly_and_auto_falls_back():
    scores = [torch.randn(5)]
    with acefast.backend("triton"), pytest.raises(RuntimeError, match="does not serve gumbel_topk on cpu"):
        ops.gumbel_topk(scores, 2, seed=0)
    assert int(ops.gumbel_topk(scores, 2, seed=0)[0].sum()) == 2
    assert acefast.get_backend() == "auto"
    with pytest.raises(InputError, match="backend must be one of"):
        acefast.set_backend("fast")


def test_a_kernel_declines_calls_by_their_arguments(monkeypatch):
    """gen in Triton is for the softmax without edge features; here it stands in for a kernel that would run."""
    module = pytest.importorskip("acefast.ops.triton.gen")
    calls = []
    monkeypatch.setattr(backend, "_triton", lambda op, device: lambda *args: calls.append(op) or reference.gen(*args))
    monkeypatch.setattr(backend, "_AUTO", {"cpu": ("triton", "torch")})
    backend.implementation.cache_clear()
    graph = acefast.Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 0, 1]]))
    x, param = torch.randn(3, 4), torch.ones(4)

    def call(name, aggr, edge=None):
        arguments = (x, edge, None, None, None, None, param, None, None, aggr, 1e-7, False)
        return backend.implementation("gen", "cpu", name)(*graph.arrays, *arguments)

    try:
        call("auto", reference.SOFTMAX)
        assert calls == ["gen"]
        expected = reference.gen(*graph.arrays, x, *[None] * 8, reference.SUM, 1e-7, False)
        assert torch.equal(call("auto", reference.SUM)[0], expected[0])
        call("auto", reference.SOFTMAX, torch.randn(3, 4))
        assert calls == ["gen"]
        with pytest.raises(RuntimeError, match="'triton' does not serve this call of gen: .* softmax only"):
            call("triton", reference.SUM)
        with pytest.raises(RuntimeError, match="edge features"):
            call("triton", reference.SOFTMAX, torch.randn(3, 4))
        backward = (x, x, x, x, None, None, None, None, None, param, None, None, reference.MAX, 0.0, *[True] * 5)
        assert "softmax only" in module.gen_bwd_declines(*graph.arrays, *backward)
    finally:
        backend.implementation.cache_clear()


def test_backend_is_restored_after_an_error():
    with pytest.raises(KeyError), acefast.backend("torch"):
        raise KeyError
    assert acefast.get_backend() == "auto"


@pytest.mark.parametrize("damage", ["missing", "corrupt"])
def test_library_that_does_not_load_warns_once_and_the_reference_serves(tmp_path, damage):
    library = tmp_path / backend.native_library("cpu").name
    if damage == "corrupt":
        library.write_bytes(b"not an ELF file")
    script = f"""
import pathlib, warnings
real = pathlib.Path.__truediv__
def elsewhere(self, other):
    if other == "lib" and self.name == "acefast":
        return pathlib.Path({str(tmp_path)!r})
    return real(self, other)
pathlib.Path.__truediv__ = elsewhere
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import acefast
pathlib.Path.__truediv__ = real
texts = [str(w.message) for w in caught if "acefast" in str(w.message)]
assert len(texts) == 1 and "libacefast_cpu" in texts[0], texts
import torch
from acefast.ops import backend, reference
assert backend.serving("spmm", "cpu") == "torch"
g = acefast.Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]))
assert acefast.ops.spmm(g, torch.tensor([[1.0], [2.0]])).tolist() == [[2.0], [1.0]]
print(backend.report()["not_loaded"]["cpu"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ("was not built" if damage == "missing" else "did not load") in done.stdout


def test_report_names_versions_and_every_op():
    report = backend.report()
    assert report["versions"]["torch"] and report["versions"]["acefast"]
    assert set(report["serving"]) == set(backend.SCHEMAS)


def test_eager_calls_give_what_the_dispatcher_gives(monkeypatch):
    """The straight way and the way through torch.ops.acefast: the same bits, forward and backward, also under no_grad."""
    g = Graph.from_edge_index(torch.randint(0, 20, (2, 90), generator=torch.Generator().manual_seed(0)), 20)
    results = []
    for straight in (True, False):
        if not straight:
            monkeypatch.setattr(backend, "_ordinary", lambda args: (None, False))
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(20, 2, 4, generator=generator).requires_grad_()
        a, m = torch.randn(20, 2, generator=generator).requires_grad_(), torch.rand(90, generator=generator).requires_grad_()
        y = ops.gat(g, x, a, a, m, dropout=0.3, seed=4) + ops.spmm(g, x, mask=m).sin()
        gradients = torch.autograd.grad((y * y).sum(), (x, a, m))
        with torch.no_grad():
            again = ops.spmm(g, x, mask=m)
        results.append((y, *gradients, again))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_what_watches_a_call_sees_the_op():
    """Fake tensors, transforms and tracing go through the dispatcher, where the op has a name."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    g = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert ops.spmm(g, torch.randn(3, 5)).shape == (3, 5)
    graph = make_fx(lambda x: ops.spmm(g, x))(torch.randn(3, 5)).graph
    assert any(node.target is torch.ops.acefast.spmm.default for node in graph.nodes)
