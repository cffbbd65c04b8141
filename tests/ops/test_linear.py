"""masked_linear, relu_dropout and elu_dropout."""

import itertools

import pytest
import torch

import acefast
from acefast import CSR, InputError, ops
from acefast.kept import KeptWeights
from acefast.ops import reference
from tests.inputs import assert_close


def sparse_features(rows, cols, density=0.15, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    return (values * (torch.rand(rows, cols, generator=generator) < density)).to(dtype)


@pytest.mark.parametrize("shape", [(0, 4, 3), (1, 1, 1), (17, 33, 7), (40, 130, 65), (9, 257, 512)])
@pytest.mark.parametrize("kept", [None, 0.9, 0.3, 0.02, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_masked_linear_values_and_gradients(each_backend, shape, kept, dtype):
    rows, inputs, outputs = shape
    acc = reference.accumulator(dtype)
    dense = sparse_features(rows, inputs, dtype=dtype)
    weight = torch.randn(outputs, inputs).to(dtype)
    mask, bias = torch.rand(outputs, inputs, dtype=acc) + 0.5, torch.randn(outputs, dtype=acc)
    keep = None if kept is None else torch.rand(outputs, inputs) < kept
    dy = torch.randn(rows, outputs).to(dtype)

    exact = [t.double().requires_grad_() for t in (dense, weight, mask, bias)]
    product = exact[1] * exact[2] * (1 if keep is None else keep)
    y_exact = exact[0] @ product.T + exact[3]
    expected = torch.autograd.grad(y_exact, exact, dy.double())

    for x in (dense, CSR.from_dense(dense)):
        leaves = [t.clone().requires_grad_() for t in (weight, mask, bias)]
        if isinstance(x, torch.Tensor):
            x = x.clone().requires_grad_()
            leaves = [x, *leaves]
        y = ops.masked_linear(x, *leaves[-3:], keep=keep)
        assert y.dtype == dtype
        assert_close(y, y_exact, dtype, "y")
        gradients = torch.autograd.grad(y, leaves, dy)
        for what, a, b in zip(("bias", "mask", "weight", "x"), gradients[::-1], expected[::-1], strict=False):
            assert_close(a, b, dtype, what)
        if keep is not None:
            assert bool((gradients[-3][~keep] == 0).all()) and bool((gradients[-2][~keep] == 0).all())


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kept", [0.7, 0.03])
def test_mask_gradient_of_removed_weights(each_backend, sparse, kept):
    dense = sparse_features(30, 50)
    weight, mask = (torch.randn(20, 50, dtype=torch.float64, requires_grad=True) for _ in range(2))
    keep, dy = torch.rand(20, 50) < kept, torch.randn(30, 20, dtype=torch.float64)
    y = ops.masked_linear(CSR.from_dense(dense) if sparse else dense, weight, mask, keep=keep, mask_grad="all")
    dweight, dmask = torch.autograd.grad(y, (weight, mask), dy)
    assert_close(dmask, (dy.T @ dense) * weight, torch.float64)
    assert_close(dweight, (dy.T @ dense) * mask * keep, torch.float64)


@pytest.mark.parametrize("options", list(itertools.product([False, True], repeat=2)))
def test_gradcheck_and_opcheck(each_backend, options):
    with_mask, with_keep = options
    dense = sparse_features(5, 8, 0.4).requires_grad_()
    weight, bias = torch.randn(3, 8, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64)
    bias.requires_grad_()
    mask = torch.rand(3, 8, dtype=torch.float64, requires_grad=True) if with_mask else None
    keep = torch.rand(3, 8) > 0.5 if with_keep else None
    csr = CSR.from_dense(dense.detach())
    assert torch.autograd.gradcheck(lambda *a: ops.masked_linear(*a, keep=keep), (dense, weight, mask, bias))
    assert torch.autograd.gradcheck(lambda *a: ops.masked_linear(csr, *a, keep=keep), (weight, mask, bias))
    arrays = (csr.rowptr, csr.col, csr.value, *csr.transpose_arrays())
    dy = torch.randn(5, 3, dtype=torch.float64)
    plain = [None if t is None else t.detach() for t in (dense, weight, mask)]
    torch.library.opcheck(torch.ops.acefast.masked_linear, (dense, weight, mask, bias, keep, False))
    torch.library.opcheck(torch.ops.acefast.masked_linear_csr, (*arrays, weight, mask, bias, keep, False))
    torch.library.opcheck(torch.ops.acefast.masked_linear_bwd, (dy, *plain, keep, True, True, False))
    torch.library.opcheck(torch.ops.acefast.masked_linear_csr_bwd, (*arrays, dy, *plain[1:], keep, False))


def test_masked_linear_refuses():
    x, weight = torch.randn(4, 6), torch.randn(3, 6)
    for arguments, words in (
        (dict(x=torch.randn(4, 5)), r"weight must have shape \[\*, 5\]"),
        (dict(x=[1]), "x must be a floating-point tensor"),
        (dict(weight=weight.double()), "weight must be torch.float32"),
        (dict(mask=torch.ones(3, 5)), r"mask must have shape \[3, 6\], got \[3, 5\]"),
        (dict(bias=torch.ones(4)), r"bias must have shape \[3\]"),
        (dict(keep=torch.ones(3, 6)), "keep must be torch.bool"),
        (dict(mask_grad="some"), "mask_grad must be one of"),
    ):
        with pytest.raises(InputError, match=words):
            ops.masked_linear(**{"x": x, "weight": weight, **arguments})


def test_csr_refuses_and_converts():
    import scipy.sparse

    dense = sparse_features(6, 9, dtype=torch.float32)
    csr = CSR.from_dense(dense)
    assert torch.equal(csr.to_dense(), dense)
    assert torch.equal(CSR.from_scipy(scipy.sparse.coo_matrix(dense.numpy())).to_dense(), dense)
    transpose = CSR(*csr.transpose_arrays(), (9, 6))
    assert torch.equal(transpose.to_dense(), dense.T)
    for rowptr, col, value, words in (
        (csr.rowptr[:-1], csr.col, csr.value, "rowptr must be int64"),
        (csr.rowptr.flip(0), csr.col, csr.value, "rowptr must rise"),
        (csr.rowptr, csr.col + 9, csr.value, r"col must lie in \[0, 9\)"),
        (csr.rowptr, csr.col, csr.value[:-1], "value must be float"),
    ):
        with pytest.raises(InputError, match=words):
            CSR(rowptr, col, value, (6, 9))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 63, 1000, 4099])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_relu_dropout_is_the_same_on_every_backend(each_backend, dtype, count, p):
    x = torch.randn(count).to(dtype)
    seed, step = 2**62 + 12345, 2**40 + 7
    leaf = x.clone().requires_grad_()
    y = ops.relu_dropout(leaf, p, seed, step)
    assert torch.equal(y, reference.relu_dropout(x, None, p, seed, step, None))
    assert torch.equal(y, ops.relu_dropout(leaf, p, seed, torch.tensor([step])))
    dy = torch.randn(count).to(dtype)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    assert torch.equal(dx, reference.relu_dropout_bwd(dy, y.detach(), p))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 5, 63, 4099])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_elu_dropout(each_backend, dtype, count, p):
    torch.manual_seed(count)
    x = (3 * torch.randn(count)).to(dtype)
    x[::7] = 0
    leaf = x.clone().requires_grad_()
    y = ops.elu_dropout(leaf, p, 5, 2**40 + 7)
    kept = ops.relu_dropout(torch.ones_like(x), p, 5, 2**40 + 7) > 0
    assert torch.equal(y, ops.elu_dropout(leaf, p, 5, torch.tensor([2**40 + 7])))
    assert torch.equal((y == 0) & ~torch.signbit(y), ~kept)  # a dropped element is +0, a kept zero -0
    dy = torch.randn(count).to(dtype)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    wide = x.double().requires_grad_()
    exact = torch.nn.functional.elu(wide) * kept / max(1 - p, 1e-9)
    assert_close(y.detach(), exact.detach(), dtype)
    norm = float(dy.double().norm()) / max(1 - p, 1e-9)  # dx = dy (1 + y) takes the rounding of y near -1
    assert_close(dx, torch.autograd.grad(exact, wide, dy.double())[0], dtype, norm=norm)
    assert_close(dx, reference.elu_dropout_bwd(dy, y.detach(), p).double(), dtype, norm=norm)


def test_elu_dropout_of_extreme_values(each_backend):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([-inf, -200.0, -17.5, -1e-4, -1e-8, -1e-30, 1e-30, inf, nan] * 5, requires_grad=True)
    y = ops.elu_dropout(x, 0.0, 0, 0)
    assert torch.allclose(y, torch.nn.functional.elu(x), rtol=4e-7, atol=0, equal_nan=True)
    (dx,) = torch.autograd.grad(y.sum(), x)
    slopes = torch.tensor([0, 0, 2.5e-8, 1 - 1e-4, 1, 1, 1, 1, nan] * 5)
    assert torch.allclose(dx, slopes, atol=6e-8, equal_nan=True)
    wide = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: ops.elu_dropout(t, 0.4, 3, 5), (wide,))
    torch.library.opcheck(torch.ops.acefast.elu_dropout, (wide, torch.arange(5), 0.4, 3, 5, None))
    torch.library.opcheck(torch.ops.acefast.elu_dropout_bwd, (wide.detach(), wide.detach(), 0.4))
    with pytest.raises(InputError, match="elu_dropout: x must be a floating-point tensor"):
        ops.elu_dropout(torch.ones(3, dtype=torch.int32), 0.5, 0, 0)


def test_relu_dropout_keeps_the_stated_fraction(each_backend):
    x = torch.ones(200_000)
    y = ops.relu_dropout(x, 0.3, 11, 0)
    kept = float((y > 0).float().mean())
    assert abs(kept - 0.7) < 5 * (0.7 * 0.3 / 200_000) ** 0.5
    assert torch.equal(y[y > 0].unique(), torch.tensor([1 / 0.7]))
    assert not torch.equal(y, ops.relu_dropout(x, 0.3, 11, 1))
    assert not torch.equal(y, ops.relu_dropout(x, 0.3, 12, 0))
    assert torch.equal(y, ops.relu_dropout(x, 0.3, 11, 0))


def test_relu_dropout_gradcheck_opcheck_and_refusals(each_backend):
    x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.relu_dropout(x, 0.4, 3, 5), (x,))
    for step in ((5, None), (0, torch.tensor([5]))):
        torch.library.opcheck(torch.ops.acefast.relu_dropout, (x, None, 0.4, 3, *step))
    torch.library.opcheck(torch.ops.acefast.relu_dropout_bwd, (x.detach(), x.detach(), 0.4))
    for arguments, words in (
        ((torch.ones(3, dtype=torch.int32), 0.5, 0, 0), "floating-point"),
        ((x, 1.5, 0, 0), r"p must lie in \[0, 1\]"),
        ((x, float("nan"), 0, 0), r"p must lie in \[0, 1\]"),
        ((x, 0.5, -1, 0), "seed must lie in"),
        ((x, 0.5, 0, 2**63), "step must lie in"),
        ((x, 0.5, 0.5, 0), "seed must be an integer"),
        ((x, 0.5, 0, torch.tensor([1.0])), "step must be torch.int64"),
        ((x, 0.5, 0, torch.tensor(1)), r"step must have shape \[1\]"),
    ):
        with pytest.raises(InputError, match=words):
            ops.relu_dropout(*arguments)


def test_philox_known_answers():
    """Random123's published test vectors for philox4x32-10."""
    ones = 0xFFFFFFFF
    vectors = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]  # fmt: skip
    for counter, key, expected in vectors:
        assert tuple(int(word) for word in reference.philox(counter, key)) == expected


def test_native_and_reference_agree_on_threads():
    x = torch.randn(2708, 64)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(ops.relu_dropout(x, 0.5, 1, 2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    with acefast.backend("torch"):
        assert torch.equal(found[0], ops.relu_dropout(x, 0.5, 1, 2))


@pytest.mark.parametrize("shape", [(4999, 70, 52), (513, 64, 48), (50, 301, 60), (300, 48, 64)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_long_sums_in_pieces(shape, dtype):
    rows, inputs, outputs = shape
    draw = torch.Generator().manual_seed(rows)
    x, weight, dy = (torch.randn(*s, generator=draw).to(dtype) for s in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    bias = torch.randn(outputs, generator=draw, dtype=reference.accumulator(dtype))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            y = ops.masked_linear(leaves[0], leaves[1], None, leaves[2])
            found.append((y.detach(), *torch.autograd.grad(y, leaves, dy)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    x, weight, dy = x.double(), weight.double(), dy.double()
    exact = (x @ weight.T + bias, dy @ weight, dy.T @ x, dy.sum(0))
    for what, a, b in zip(("y", "dx", "dw", "dbias"), found[0], exact, strict=True):
        assert_close(a, b, dtype, what)


def test_autocast_region_does_not_narrow_the_product(each_backend):
    x, weight = torch.randn(20, 16), torch.randn(5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.masked_linear(x, weight)
    assert_close(y, x.double() @ weight.double().T, torch.float32)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_listed_weights_equal_the_dense_product(each_backend, dtype, share, turned, tiled, monkeypatch):
    monkeypatch.setattr(KeptWeights, "tiled", lambda self, x: tiled)
    generator = torch.Generator().manual_seed(8)
    dense = torch.randn(30, 50, generator=generator).double() * (torch.rand(30, 50, generator=generator) < 0.2)
    keep = torch.rand(24, 50, generator=generator) < share
    kept = KeptWeights(keep)
    assert kept.shape == keep.shape
    weight = torch.randn(24, 50, generator=generator).to(dtype)
    weight = (weight.t().contiguous().t() if turned else weight).requires_grad_()
    bias = torch.randn(24, generator=generator, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    bias.requires_grad_()
    x = CSR.from_dense(dense.to(dtype))
    y = ops.masked_linear(x, weight, bias=bias, keep=kept)
    dy = torch.randn(30, 24, generator=generator).to(dtype)
    y.backward(dy)
    wide = (weight.detach().double() * keep).requires_grad_()
    expected = x.to_dense().double() @ wide.t() + bias.detach().double()
    expected.backward(dy.double())
    assert_close(y, expected.detach(), dtype, "y")
    assert_close(weight.grad, wide.grad * keep, dtype, "dw")
    assert torch.allclose(bias.grad.double(), dy.double().sum(0), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert torch.equal(ops.masked_linear(x.to_dense(), weight, keep=kept), ops.masked_linear(x.to_dense(), weight, keep=keep))
    kept.values = kept.listed(weight.detach()).requires_grad_()  # stand for the weight, with x of either kind
    for features in (x, x.to_dense()):
        y_listed = ops.masked_linear(features, torch.full_like(weight, torch.nan), bias=bias.detach(), keep=kept)
        (gradient,) = torch.autograd.grad(y_listed, kept.values, dy)
        assert_close(y_listed, expected.detach(), dtype, "y by values")
        assert_close(gradient, kept.listed(wide.grad), dtype, "dvalues")
    assert torch.equal(kept.spread(kept.values.detach(), torch.zeros_like(weight.detach())), weight.detach() * keep)


def test_listed_weights_gradcheck_opcheck_and_refusals(each_backend):
    x = CSR.from_dense(torch.randn(6, 5).double() * (torch.rand(6, 5) < 0.5))
    kept = KeptWeights(torch.rand(4, 5) < 0.5)
    weight, bias = torch.randn(4, 5).double().requires_grad_(), torch.randn(4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w, b: ops.masked_linear(x, w, bias=b, keep=kept), (weight, bias))
    arrays = (x.rowptr, x.col, x.value, *x.transpose_arrays())
    listed = (weight.detach().flatten(), kept.ptr, kept.out, kept.places(False))
    torch.library.opcheck(torch.ops.acefast.masked_linear_kept, (*arrays, *listed, bias.detach(), 4, False))
    torch.library.opcheck(torch.ops.acefast.masked_linear_kept_bwd, (*arrays, torch.randn(6, 4).double(), *listed))
    with pytest.raises(InputError, match=r"keep must be bool \[O, K\]"):
        KeptWeights(torch.ones(4, 5))
    with pytest.raises(InputError, match=r"keep must have shape \[4, 5\]"):
        ops.masked_linear(x, weight, keep=KeptWeights(torch.ones(5, 4, dtype=torch.bool)))


def test_lists_pay_where_few_of_many_weights_are_kept():
    def keep(share, *shape):
        return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < share

    bag, dense = (CSR.from_dense(keep(share, 40, 500).float()) for share in (0.02, 0.1))
    cases = ((bag, 0.01, True, False), (bag, 0.2, False, False), (dense, 0.035, True, True), (dense, 0.2, False, True))
    for x, share, pays, tiled in cases:
        pattern = keep(share, 256, 500)
        assert KeptWeights.pays(pattern, x) == pays and KeptWeights(pattern).tiled(x) == tiled
    columns = (torch.arange(500) < 50) * keep(0.01 * 500 / 50, 256, 500)  # as many weights, in a tenth of the columns
    first = CSR.from_dense((torch.arange(500) < 10).float().expand(40, 500))
    assert KeptWeights.pays(keep(0.01, 256, 500), first) and not KeptWeights.pays(columns, first), "they meet all entries of x"
    assert not KeptWeights.pays(keep(0.1, 256, 0), CSR.from_dense(torch.zeros(3, 0)))
    assert not KeptWeights.pays(keep(0.1, 4, 5), CSR.from_dense(torch.zeros(3, 5)))
