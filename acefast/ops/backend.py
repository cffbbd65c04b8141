"""The only place that knows which backends exist and chooses among them: native | triton | torch.

Every op is declared once, in `SCHEMAS`. Its schema is defined in two namespaces: `acefast::op`, which autograd and the
compiler see and whose implementation here picks a backend at each call, and `acefast_native::op`, which the op libraries
(csrc/) implement for CPU and CUDA. `torch` is the plain-torch reference and serves everything.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import warnings
from pathlib import Path

import torch

from acefast.errors import InputError
from acefast.ops import reference

_GRAPH = "Tensor rowptr, Tensor col, Tensor? eid, Tensor colptr, Tensor row, Tensor? ceid"
_CSR = "Tensor rowptr, Tensor col, Tensor value, Tensor colptr, Tensor row, Tensor cvalue"

SCHEMAS = {
    "spmm": f"({_GRAPH}, Tensor x, Tensor? weight, Tensor? mask, Tensor? keep, Tensor? self_weight, Tensor? row_scale,"
    " bool all_edges) -> Tensor",
    "spmm_bwd": f"({_GRAPH}, Tensor dy, Tensor x, Tensor? weight, Tensor? mask, Tensor? keep, Tensor? self_weight,"
    " Tensor? row_scale, bool need_dx, bool need_dcoef, bool all_edges) -> (Tensor, Tensor, Tensor)",
    "spmm_max": f"({_GRAPH}, Tensor x, Tensor? weight, Tensor? mask, Tensor? keep, bool largest) -> (Tensor, Tensor)",
    "spmm_max_bwd": f"({_GRAPH}, Tensor dy, Tensor arg, Tensor x, Tensor? weight, Tensor? mask, Tensor? keep, bool need_dx,"
    " bool need_dcoef) -> (Tensor, Tensor)",
    "sddmm": f"({_GRAPH}, Tensor p, Tensor q) -> Tensor",
    "edge_softmax": f"({_GRAPH}, Tensor s, Tensor? keep) -> Tensor",
    "edge_softmax_bwd": f"({_GRAPH}, Tensor a, Tensor da, Tensor? keep) -> Tensor",
    "gcn_norm": f"({_GRAPH}, Tensor? mask, Tensor? keep, Tensor? loops, bool masked) -> (Tensor, Tensor, Tensor)",
    "gcn_norm_bwd": f"({_GRAPH}, Tensor dinv, Tensor dc, Tensor? dc_self, Tensor? loops, Tensor? keep) -> Tensor",
    "gat": f"({_GRAPH}, Tensor z, Tensor a_src, Tensor a_dst, Tensor? mask, Tensor? keep, bool mask_on_logit,"
    " float negative_slope, float dropout, int seed, int step, Tensor? step_at, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
    "gat_bwd": f"({_GRAPH}, Tensor dy, Tensor y, Tensor lse, Tensor slope_y, Tensor slope_sum, Tensor z, Tensor a_src,"
    " Tensor a_dst, Tensor? mask, Tensor? keep, bool mask_on_logit, float negative_slope, float dropout, int seed,"
    " int step, Tensor? step_at, bool need_dmask) -> (Tensor, Tensor, Tensor, Tensor)",
    "gen": f"({_GRAPH}, Tensor x, Tensor? edge, Tensor? weight, Tensor? bias, Tensor? mask, Tensor? keep, Tensor? param,"
    " Tensor? row_scale, Tensor? removed, int aggr, float eps, bool all_edges) -> (Tensor, Tensor)",
    "gen_bwd": f"({_GRAPH}, Tensor dy, Tensor y, Tensor stat, Tensor x, Tensor? edge, Tensor? weight, Tensor? bias,"
    " Tensor? mask, Tensor? keep, Tensor? param, Tensor? row_scale, Tensor? removed, int aggr, float eps, bool need_dx,"
    " bool need_dmask, bool need_dedge, bool need_dparam, bool all_edges) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "compact": f"({_GRAPH}, Tensor keep, int num_kept, bool renumber)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "relu_dropout": "(Tensor x, Tensor? rows, float p, int seed, int step, Tensor? step_at) -> Tensor",
    "relu_dropout_bwd": "(Tensor dy, Tensor y, float p) -> Tensor",
    "elu_dropout": "(Tensor x, Tensor? rows, float p, int seed, int step, Tensor? step_at) -> Tensor",
    "elu_dropout_bwd": "(Tensor dy, Tensor y, float p) -> Tensor",
    "masked_linear": "(Tensor x, Tensor weight, Tensor? mask, Tensor? bias, Tensor? keep, bool all_weights) -> Tensor",
    "masked_linear_bwd": "(Tensor dy, Tensor x, Tensor weight, Tensor? mask, Tensor? keep, bool need_dx, bool need_dw,"
    " bool all_weights) -> (Tensor, Tensor)",
    "masked_linear_csr": f"({_CSR}, Tensor weight, Tensor? mask, Tensor? bias, Tensor? keep, bool all_weights) -> Tensor",
    "masked_linear_csr_bwd": f"({_CSR}, Tensor dy, Tensor weight, Tensor? mask, Tensor? keep, bool all_weights) -> Tensor",
    "masked_linear_kept": f"({_CSR}, Tensor weight, Tensor ptr, Tensor out, Tensor place, Tensor? bias, int outputs,"
    " bool tiled) -> Tensor",
    "masked_linear_kept_bwd": f"({_CSR}, Tensor dy, Tensor weight, Tensor ptr, Tensor out, Tensor place) -> Tensor",
    "topk_mask": "(Tensor[] scores, int k, Tensor[]? alive, bool largest, bool magnitude) -> (Tensor[], Tensor)",
    "topk_mask_out": "(Tensor[] scores, int k, Tensor[]? alive, bool largest, bool magnitude, Tensor(a!)[] out) -> Tensor",
    "gumbel_topk": "(Tensor[] scores, int k, float tau, int seed, Tensor[]? alive, bool largest) -> (Tensor[], Tensor)",
    "exchange": "(Tensor[] keep, Tensor[] kept_scores, Tensor[] pruned_scores, int k, float tau, int seed)"
    " -> (Tensor[], Tensor[], Tensor[], Tensor)",
    "masked_adam": "(Tensor[] grad, Tensor[]? place, Tensor[]? keep, Tensor(a!)[] theta, Tensor(b!)[] mask,"
    " Tensor(c!)[] theta_mean, Tensor(d!)[] theta_square, Tensor(e!)[] mask_mean, Tensor(f!)[] mask_square,"
    " Tensor(g!)[] weight, Tensor(h!) step, float[] theta_settings, float[] mask_settings) -> ()",
}

# Ops that have a Triton implementation, and the module under acefast.ops.triton that holds it.
_TRITON_OPS = {
    "spmm": "spmm", "spmm_bwd": "spmm", "gat": "gat", "gat_bwd": "gat", "gen": "gen", "gen_bwd": "gen",
    "topk_mask": "topk_mask", "topk_mask_out": "topk_mask",
}  # fmt: skip

# What `auto` tries, in order, per device. On an H200 no Triton kernel was faster by more than 1 %
# forward and backward (bench/results/arxiv-cuda-ops.json); gat's forward alone was, by a fifth.
_AUTO = {"cpu": ("native", "torch"), "cuda": ("native", "triton", "torch")}

BACKENDS = ("auto", "native", "triton", "torch")

_library_folder = Path(__file__).parent.parent / "lib"
_define = torch.library.Library("acefast", "FRAGMENT")
_define_native = torch.library.Library("acefast_native", "FRAGMENT")
_chosen = "auto"
_load_errors: dict[str, str] = {}
_loaded: dict[str, str] = {}


def set_backend(name: str) -> None:
    """Choose the backend of all ops from here on: "auto", "native", "triton" or "torch".

    "auto" takes the fastest that can serve each op; an explicit choice that cannot serve raises when the op is called.
    """
    global _chosen
    if name not in BACKENDS:
        raise InputError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    _chosen = name


def get_backend() -> str:
    """The name last given to `set_backend`."""
    return _chosen


@contextlib.contextmanager
def backend(name: str):
    """`with acefast.backend("torch"): ...` uses that backend inside the block."""
    before = get_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def native_library(device: str) -> Path:
    """The op library for `device` on this machine; one CPU library is built per instruction-set level."""
    if device == "cuda":
        return _library_folder / "libacefast_cuda.so"
    level = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "default")
    return _library_folder / f"libacefast_cpu_{level}.so"


def _load_native(device: str) -> None:
    path = native_library(device)
    if not path.exists():
        _load_errors[device] = f"{path.name} was not built (ACEFAST_BUILD=none, or no compiler at installation)"
    else:
        try:
            torch.ops.load_library(path)
        except OSError as error:
            _load_errors[device] = f"{path.name} did not load: {error}"
        else:
            _loaded[device] = path.name
            return
    warnings.warn(f"acefast: {_load_errors[device]}; a slower backend serves {device} instead", stacklevel=2)


@functools.cache
def _native(op: str, device: str):
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"acefast_native::{op}", device.upper()):
        return None
    return getattr(torch.ops.acefast_native, op).default


@functools.cache
def _triton_error() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def _triton_module(op: str):
    return importlib.import_module(f"acefast.ops.triton.{_TRITON_OPS[op]}")


@functools.cache
def _triton(op: str, device: str):
    if op not in _TRITON_OPS or _triton_error():
        return None
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    return getattr(_triton_module(op), op)


def _find(name: str, op: str, device: str):
    if name == "native":
        return _native(op, device)
    if name == "triton":
        return _triton(op, device)
    # An op's arithmetic is its own: an autocast region must not narrow the products inside the reference.
    return torch.autocast(device, enabled=False)(getattr(reference, op))


def _declines(name: str, op: str):
    """The function that says of a call's arguments why backend `name` does not serve them (None: it does), if it has one."""
    return getattr(_triton_module(op), f"{op}_declines", None) if name == "triton" else None


@functools.cache
def implementation(op: str, device: str, name: str):
    """The function that serves `op` on `device` under backend `name`. Raises RuntimeError where an explicit choice cannot;
    so does the function itself for a call whose arguments the chosen backend declines."""
    return _first_of(_AUTO[device] if name == "auto" else (name,), op, device, name)


def _first_of(candidates: tuple[str, ...], op: str, device: str, name: str):
    for place, candidate in enumerate(candidates):
        function = _find(candidate, op, device)
        if function is None:
            continue
        declines = _declines(candidate, op)
        if declines is None:
            return function

        def serve(*args):
            reason = declines(*args)
            if reason is None:
                return function(*args)
            if name != "auto":
                raise RuntimeError(f"backend {name!r} does not serve this call of {op}: {reason}")
            return _first_of(candidates[place + 1 :], op, device, name)(*args)

        return serve
    raise RuntimeError(f"backend {name!r} does not serve {op} on {device}: {_why_not(name, op, device)}")


def loaded() -> dict[str, str]:
    """Device -> file name of the op library that is loaded for it."""
    return dict(_loaded)


def serving(op: str, device: str) -> str:
    """The name of the backend that serves `op` on `device` under "auto"."""
    return next(name for name in _AUTO[device] if _find(name, op, device) is not None)


def _why_not(name: str, op: str, device: str) -> str:
    if name == "native":
        return _load_errors.get(device, f"no native {device} kernel of this op")
    if _triton_error():
        return _triton_error()
    if op not in _TRITON_OPS:
        return "there is no Triton kernel of this op"
    return "Triton runs on CUDA tensors (or anywhere under TRITON_INTERPRET=1)"


def report() -> dict:
    """What `acefast env` prints: versions, what was built and loaded, and which backend serves which op."""
    try:
        from acefast import _C

        build = _C.build_info()
    except ImportError as error:
        build = {"error": str(error)}

    def version(package):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return {
        "versions": {name: version(name) for name in ("acefast", "torch", "triton", "numpy", "torch_geometric")},
        "build": build,
        "libraries": sorted(path.name for path in _library_folder.glob("*.so")),
        "loaded": loaded(),
        "not_loaded": dict(_load_errors),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda_available": torch.cuda.is_available(),
        "triton_error": _triton_error(),
        "serving": {op: {device: serving(op, device) for device in devices} for op in SCHEMAS},
    }


_functions: dict[str, type[torch.autograd.Function]] = {}  # the ops that have a gradient, for eager calls


def register_autograd(op: str, backward, setup_context) -> None:
    """The gradient of `op`, in the form of torch.library.register_autograd: of `acefast::op`, and of eager calls by `call`."""

    def forward(ctx, *args):
        device = next(a for a in args if isinstance(a, torch.Tensor)).device.type
        output = implementation(op, device, _chosen)(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    _functions[op] = type(op, (torch.autograd.Function,), members)
    torch.library.register_autograd(f"acefast::{op}", backward, setup_context=setup_context)


def call(op: str, *args):
    """`op` of ordinary tensors straight at its implementation, which spares the dispatcher's way through Python (most of the
    time of a small call); anything else (compiling, export, tracing, fake tensors, subclasses, transforms) goes through
    `torch.ops.acefast`. The same results and gradients either way."""
    device, wants_gradient = _ordinary(args)
    wants_gradient = wants_gradient and torch.is_grad_enabled()
    if device not in _AUTO or (wants_gradient and op not in _functions):
        return getattr(torch.ops.acefast, op)(*args)
    if wants_gradient:
        return _functions[op].apply(*args)
    return implementation(op, device, _chosen)(*args)


def _ordinary(args) -> tuple[str | None, bool]:
    """(device, whether a tensor requires a gradient) where every argument is an ordinary value and nothing watches the call;
    else (None, False)."""
    if (
        torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
    ):  # fmt: skip
        return None, False
    device, wants_gradient = None, False
    for argument in args:
        for value in argument if type(argument) in (list, tuple) else (argument,):
            if type(value) in _TENSORS:
                device = device or value.device.type
                wants_gradient = wants_gradient or value.requires_grad
            elif type(value) not in _VALUES:
                return None, False
    return device, wants_gradient


_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
_VALUES = frozenset((type(None), bool, int, float))


def _register(op: str) -> None:
    _define.define(op + SCHEMAS[op])
    _define_native.define(op + SCHEMAS[op])
    for device in _AUTO:

        def call(*args, op=op, device=device):
            return implementation(op, device, _chosen)(*args)

        _define.impl(op, call, device.upper())


for _op in SCHEMAS:
    _register(_op)
_load_native("cpu")
if torch.cuda.is_available():
    _load_native("cuda")
else:
    _load_errors["cuda"] = "torch has no CUDA device here"
