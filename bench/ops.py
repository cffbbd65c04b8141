"""`python -m bench ops`: the ops against their peers, forward and backward, in one run."""

import argparse
import copy
import dataclasses
import itertools
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import acefast
from acefast import Graph, ops
from acefast.nn.gat import attention_terms
from acefast.ops import backend
from acefast.pruning import global_magnitude_
from bench import graphs
from bench.harness import Row, close, compare, copy_bandwidth, environment, limit_memory
from bench.peers import ops as peers
from tests.inputs import REPOSITORY, data_folder

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
HEADS, HEAD_WIDTH = 8, 16
EDGE_FEATURES = 8  # of ogbn-proteins
WHOLE_SHAPES = ("cora", "arxiv")  # where every variant of an op runs; the others run its main one
PRUNED_LAYERS, PRUNED_WIDTH, PRUNED_SHARE = 25, 2048, 0.8  # 104.9 million weights, of which the share is a whole number
ADAM_TENSORS = 10
MEMORY_NODES, MEMORY_DEGREES = 4_000, (14, 120, 597)  # the last is ogbn-proteins' mean degree


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", nargs="+", choices=CASES, default=list(CASES), metavar="OP", help=f"of: {', '.join(CASES)}")
    parser.add_argument(
        "--shape", nargs="+", choices=graphs.SHAPES, default=list(graphs.SHAPES), metavar="SHAPE",
        help=f"of: {', '.join(graphs.SHAPES)}; real where the data folder has it, else a generated twin",
    )  # fmt: skip
    parser.add_argument(
        "--scale", type=float,
        help="shrinks the nodes at constant mean degree; default 1, and on the CPU 0.02 for proteins, products and reddit",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the features; masks follow as the ops have them")
    parser.add_argument("--threads", type=int, help="CPU threads; default: what torch takes")
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--budget", type=float, default=5.0, help="seconds of timing per implementation and case")
    parser.add_argument(
        "--data-root", type=Path, help="folder with planetoid/ and ogb/; default: ACEFAST_DATA, ../shared/data or .data"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument(
        "--peer-python", type=Path,
        help="run all this under that interpreter, so that peers of its environment (DGL) are measured in the same run; "
        "what it lacks is taken from this environment, so the Python versions must agree",
    )  # fmt: skip


def main(options: argparse.Namespace, arguments: list[str]) -> int:
    if options.peer_python is not None:
        reexecute(options.peer_python, arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.data_root is None:
        options.data_root = next((f for f in (data_folder(), REPOSITORY / ".data") if f.is_dir()), None)
    if options.device == "cpu":
        limit_memory()
    warnings.filterwarnings("ignore", message="(?s).*(beta|invariant).*", category=UserWarning)  # of torch's sparse tensors
    options.copy_bytes_per_s = copy_bandwidth(options.device)
    head = environment() | {"device": options.device, "copy_bytes_per_s": options.copy_bytes_per_s}
    print("  ".join(f"{key}={value}" for key, value in head.items()))
    rows: list[Row] = []
    for group in groups(options):
        print_group(group)
        rows += group
        if options.json is not None:  # after each case: a run that is cut short leaves what it measured
            write(options.json, head, rows)
    if options.json is not None:
        print(f"written: {options.json}")
    wrong = [row for row in rows if row.ours and not row.equal]
    return 1 if wrong or not rows else 0


def reexecute(python: Path, arguments: list[str]) -> None:
    """Replace this process by the same benchmark under `python`, this environment's packages behind its own."""
    if not python.exists():
        raise SystemExit(f"bench: --peer-python: there is no {python}")
    place = arguments.index("--peer-python") if "--peer-python" in arguments else None
    kept = [a for a in arguments if not a.startswith("--peer-python=")]
    if place is not None:
        kept = arguments[:place] + arguments[place + 2 :]
    script = (
        "import runpy, sys\n"
        f"sys.path[:0] = [{str(REPOSITORY)!r}]\n"
        f"sys.path += [p for p in {sys.path!r} if p not in sys.path]\n"
        f"if sys.version_info[:2] != {tuple(sys.version_info[:2])!r}:\n"
        f"    sys.exit('bench: --peer-python is Python ' + sys.version.split()[0] + ', this is {platform.python_version()}')\n"
        f"sys.argv[1:] = {kept!r}\n"
        "runpy.run_module('bench', run_name='__main__', alter_sys=True)\n"
    )
    sys.stdout.flush()
    os.execv(python, [str(python), "-c", script])


def write(path: Path, head: dict, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": head, "rows": [row.to_json() for row in rows]}, indent=1, allow_nan=False)
    path.with_suffix(".tmp").write_text(text + "\n")
    path.with_suffix(".tmp").replace(path)


def print_group(rows: list[Row]) -> None:
    ours = rows[0]
    print(f"\n{ours.op} {ours.variant}  {ours.case}  {ours.shape}  {ours.dtype}  {ours.device}", flush=True)
    for row in rows:
        if row.median_s is None:
            print(f"  {row.impl:<32} {row.note}")
            continue
        figures = f"{row.median_s * 1e3:10.3f} ms  (min {row.min_s * 1e3:.3f}, n={row.repeats})  peak {row.peak_bytes / 2**20:8.1f} MiB"
        fraction = "" if row.copy_fraction is None else f"  {row.copy_fraction:5.0%} of a copy"
        print(f"  {row.impl:<32}{figures}  {row.median_s / ours.median_s:7.2f} x {fraction}  {row.note}", flush=True)


# Cases.


@dataclasses.dataclass
class Case:
    """One op on one graph: our function and the peers', all of the same inputs, and the least bytes each pass moves."""

    op: str
    variant: str
    inputs: tuple[torch.Tensor, ...]
    ours: Callable
    peers: dict[str, Callable]
    floor: tuple[int, int]  # bytes of the forward, and of the backward beyond it
    constant: tuple[int, ...] = ()  # which inputs have no gradient
    schema: str = ""  # where it is not `op`


def groups(options: argparse.Namespace) -> Iterator[list[Row]]:
    """Rows of one op, shape and pass at a time."""
    for name in options.shape:
        on_graph = [op for op in options.op if op not in WITHOUT_GRAPH]
        if on_graph:
            title, g = graphs.load(name, options.scale, options.device, options.data_root)
            shape = f"{title} N={g.num_src} E={g.num_edges}"
            for op in on_graph:
                if op == "selection":
                    yield from selection_groups(options, shape, name, g)
                    continue
                for case in CASES[op](options, name, g):
                    yield from case_groups(options, shape, g, case)
            peers.forget_graphs()
    for op in WITHOUT_GRAPH:
        if op in options.op:
            yield from CASES[op](options)


def case_groups(options, shape: str, g: Graph, case: Case) -> Iterator[list[Row]]:
    dtype = DTYPES[options.dtype]
    implementations = ours_on(options.device, case.schema or case.op, case.ours) | case.peers
    leaves = [i for i, t in enumerate(case.inputs) if t.is_floating_point() and i not in case.constant]
    with torch.no_grad():
        dy = gradient_like(case.ours(*case.inputs))
    calls = {
        "fwd": {name: forward(f, case.inputs) for name, f in implementations.items()},
        "fwd+bwd": {name: forward_backward(f, case.inputs, leaves, dy) for name, f in implementations.items()},
    }
    floors = {"fwd": case.floor[0], "fwd+bwd": sum(case.floor)}
    for what, by_name in calls.items():
        yield compare(
            by_name, lambda a, b: close(a, b, dtype), options.device, options.budget, options.copy_bytes_per_s, floors[what],
            op=case.op, variant=case.variant, shape=shape, case=what, dtype=options.dtype,
            nodes=g.num_dst, edges=g.num_edges, features=dy.shape[1:].numel(),
        )  # fmt: skip


def gradient_like(y: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """What flows back into y: the same in each run."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y)


def ours_on(device: str, op: str, function: Callable) -> dict[str, Callable]:
    """"acefast" as a user gets it and, on a GPU, each other backend that has the op."""
    implementations = {"acefast": function}
    if device == "cuda":
        default = backend.serving(op, "cuda")
        for name in ("native", "triton"):
            try:
                backend.implementation(op, "cuda", name)
            except RuntimeError:
                continue
            if name != default:
                implementations[f"acefast ({name})"] = under(name, function)
    return implementations


def under(name: str, function: Callable) -> Callable:
    def call(*inputs):
        # autograd calls the backward on a thread of its own, under the same choice
        with acefast.backend(name):
            return function(*inputs)

    call.backend = name
    return call


def forward(function: Callable, inputs) -> Callable:
    def call():
        with torch.no_grad():
            return function(*inputs)

    return call


def forward_backward(function: Callable, inputs, leaves: list[int], dy: torch.Tensor) -> Callable:
    def call():
        given = [t.detach().requires_grad_(i in leaves) for i, t in enumerate(inputs)]
        with acefast.backend(getattr(function, "backend", acefast.get_backend())):
            y = function(*given)
            return y.detach(), *torch.autograd.grad(y, [given[i] for i in leaves], dy.to(y.dtype))

    return call


class Inputs:
    """Random tensors of a case, the same on every device: features in the run's dtype, what belongs to edges and what is
    learned in the accumulator's."""

    def __init__(self, options, seed: int = 0):
        self.generator, self.device = torch.Generator().manual_seed(seed), options.device
        self.dtype = DTYPES[options.dtype]
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32

    def features(self, *shape):
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def learned(self, *shape, scale=1.0):
        return (scale * torch.randn(shape, generator=self.generator)).to(self.device, self.wide)

    def mask(self, g: Graph):
        """In (0.1, 1): a degree by masks is never 0."""
        return (0.1 + 0.9 * torch.rand(g.num_edges, generator=self.generator)).to(self.device, self.wide)


def floor_of(g: Graph, dtype, width: int, edge_fwd: int, edge_bwd: int) -> tuple[int, int]:
    """Bytes of x and y forward, of dy, x, y and dx backward, and 4-byte values per edge: indices, masks, their gradients."""
    item = torch.empty(0, dtype=dtype).element_size()
    rows = width * item
    forward_bytes = (g.num_src + g.num_dst) * rows
    return forward_bytes + 4 * edge_fwd * g.num_edges, 2 * forward_bytes + 4 * edge_bwd * g.num_edges


def spmm_cases(options, name: str, g: Graph) -> Iterator[Case]:
    for reduce in ("sum", "mean", "max") if name in WHOLE_SHAPES else ("sum",):
        inputs = Inputs(options)
        yield Case(
            "spmm", reduce, (inputs.features(g.num_src, options.features), inputs.mask(g)),
            lambda x, mask, reduce=reduce: ops.spmm(g, x, mask=mask, reduce=reduce), peers.spmm(g, reduce),
            floor_of(g, inputs.dtype, options.features, 2, 3), schema="spmm_max" if reduce == "max" else "",
        )  # fmt: skip


def gat_cases(options, name: str, g: Graph) -> Iterator[Case]:
    """The attention terms are computed from z inside, as the libraries' layers do."""

    def ours(mask_on):
        def call(z, att_src, att_dst, mask=None):
            z = z.view(-1, HEADS, HEAD_WIDTH)
            return ops.gat(g, z, *attention_terms(z, att_src, att_dst), mask=mask, mask_on=mask_on or "message").flatten(1)

        return call

    for mask_on in (None, "message", "logit") if name in WHOLE_SHAPES else (None,):
        inputs = Inputs(options)
        att = inputs.learned(1, HEADS, HEAD_WIDTH, scale=0.3), inputs.learned(1, HEADS, HEAD_WIDTH, scale=0.3)
        given = (inputs.features(g.num_src, HEADS * HEAD_WIDTH), *att) + ((inputs.mask(g),) if mask_on else ())
        yield Case(
            "gat", f"{HEADS}x{HEAD_WIDTH}, " + (f"mask on the {mask_on}" if mask_on else "no mask"), given, ours(mask_on),
            peers.gat(g, mask_on, HEADS, HEAD_WIDTH),
            floor_of(g, inputs.dtype, HEADS * HEAD_WIDTH, 1 + bool(mask_on), 1 + 2 * bool(mask_on)),
        )  # fmt: skip


def gen_cases(options, name: str, g: Graph) -> Iterator[Case]:
    variants = [("softmax", False)]
    if name in WHOLE_SHAPES:
        variants += [("power", False), ("max", False), ("mean", False)]
    if name == "proteins":
        variants.append(("softmax", True))
    for aggr, encoder in variants:
        inputs = Inputs(options)
        given = [inputs.features(g.num_src, options.features), inputs.mask(g)]
        parameter = {"softmax": "t", "power": "p"}.get(aggr)
        if parameter:
            given.append(torch.full((1,), 1.3, dtype=inputs.wide, device=options.device))
        edge_attr = len(given)
        if encoder:
            given += [inputs.features(g.num_edges, EDGE_FEATURES), inputs.learned(options.features, EDGE_FEATURES, scale=0.3)]
            given.append(inputs.learned(options.features, scale=0.3))
        per_edge = (EDGE_FEATURES if encoder else 0) * inputs.dtype.itemsize // 4
        yield Case(
            "gen", aggr + ", mask" + (f", learned {parameter}" if parameter else "") + (", edge encoder" if encoder else ""),
            tuple(given), gen_function(g, aggr, parameter, encoder), peers.gen(g, aggr, encoder),
            floor_of(g, inputs.dtype, options.features, 2 + per_edge, 3 + per_edge), constant=(edge_attr,),
        )  # fmt: skip


def gen_function(g: Graph, aggr: str, parameter: str | None, encoder: bool, **fixed) -> Callable:
    def call(x, mask, *rest):
        named = dict(fixed)
        if parameter:
            named[parameter] = rest[0]
        if encoder:
            named |= dict(zip(("edge_attr", "encoder_weight", "encoder_bias"), rest[-3:], strict=True))
        return ops.gen(g, x, mask=mask, aggr=aggr, eps=peers.EPS, **named)

    return call


def edge_softmax_cases(options, name: str, g: Graph) -> Iterator[Case]:
    inputs = Inputs(options)
    s = inputs.features(g.num_edges, HEADS)
    one = s.numel() * s.element_size()
    yield Case("edge_softmax", f"{HEADS} heads", (s,), lambda s: ops.edge_softmax(g, s), peers.edge_softmax(g), (2 * one, 3 * one))


def sddmm_cases(options, name: str, g: Graph) -> Iterator[Case]:
    inputs = Inputs(options)
    p, q = (inputs.features(rows, options.features) for rows in (g.num_dst, g.num_src))
    yield Case(
        "sddmm", "", (p, q), lambda p, q: ops.sddmm(g, p, q).to(p.dtype), peers.sddmm(g),
        floor_of(g, inputs.dtype, options.features, 2, 3),
    )  # fmt: skip


def gcn_norm_cases(options, name: str, g: Graph) -> Iterator[Case]:
    inputs = Inputs(options)
    item = inputs.mask(g).element_size()
    yield Case(
        "gcn_norm", "masked degrees, times the mask", (inputs.mask(g),),
        lambda mask: ops.gcn_norm(g, mask, add_self_loops=False)[0] * mask, peers.gcn_norm(g),
        (g.num_edges * (2 * item + 4), g.num_edges * (3 * item + 8)),
    )  # fmt: skip


# Prepared selections, memory, selection of the top k.


def selection_groups(options, shape: str, name: str, g: Graph) -> Iterator[list[Row]]:
    """Forward and backward on half of the edges, given as a prepared selection, as flags and as a graph of its own, against
    all edges. The first three must agree; all edges are held against a selection of all."""
    inputs = Inputs(options)
    keep = (torch.rand(g.num_edges, generator=inputs.generator) < 0.5).to(options.device)
    half, everything, small = g.select(keep), g.select(torch.ones_like(keep)), g.compact(keep)
    mask = inputs.mask(g)
    x = inputs.features(g.num_src, options.features)
    z = inputs.features(g.num_src, HEADS, HEAD_WIDTH)
    terms = [inputs.learned(g.num_src, HEADS) for _ in range(2)]
    t = torch.full((1,), 1.3, dtype=inputs.wide, device=options.device)
    functions = {
        "spmm": (lambda graph, keep: lambda x, mask: ops.spmm(graph, x, mask=mask, keep=keep), (x, mask)),
        "gat": (lambda graph, keep: lambda z, a, b, mask: ops.gat(graph, z, a, b, mask=mask, keep=keep), (z, *terms, mask)),
        "gen": (
            lambda graph, keep: lambda x, t, mask: ops.gen(graph, x, mask=mask, keep=keep, t=t, eps=peers.EPS),
            (x, t, mask),
        ),
    }
    for op, (make, given) in functions.items():
        leaves = list(range(len(given)))
        with torch.no_grad():
            dy = gradient_like(make(g, half)(*given))

        def call(graph, keep, given=given, make=make, leaves=leaves, dy=dy):
            return forward_backward(make(graph, keep), given, leaves, dy)

        kept_mask = mask[keep]
        compacted = call(small, None, given=(*given[:-1], kept_mask))
        calls = {
            "acefast, prepared selection": call(g, half),
            "acefast, compacted graph": compacted,
            "acefast, keep flags": call(g, keep),
            "acefast, all edges": call(g, None),
        }
        all_selected = call(g, everything)()

        def same(expected, found):
            return close(expected, found, DTYPES[options.dtype])

        def same_on_kept(expected, found):  # the compacted graph has the masks of the kept edges alone
            return same((*expected[:-1], expected[-1][keep]), found)

        equal = dict.fromkeys(calls, same) | {
            "acefast, compacted graph": same_on_kept,
            "acefast, all edges": lambda _, found, expected=all_selected: same(expected, found),
        }
        rows = compare(
            calls, equal, options.device, options.budget, options.copy_bytes_per_s, op="selection", variant=f"{op}, half kept",
            shape=shape, case="fwd+bwd", dtype=options.dtype, nodes=g.num_dst, edges=g.num_edges, features=dy[0].numel(),
        )  # fmt: skip
        median = {row.impl: row.median_s for row in rows}
        if None not in median.values():
            against = {"all edges": median["acefast, all edges"], "the compacted graph": median["acefast, compacted graph"]}
            rows = [
                dataclasses.replace(row, note=", ".join(f"{row.median_s / s:.2f} of {what}" for what, s in against.items()))
                for row in rows
            ]
        yield rows


def memory_groups(options) -> Iterator[list[Row]]:
    """Peak memory beyond the inputs of gen with the edge encoder at three densities on the same nodes: it follows N x F and
    not E x F."""
    nodes = max(16, round(MEMORY_NODES * (options.scale or 1.0)))
    for degree in MEMORY_DEGREES:
        g = graphs.power_law(nodes, nodes * degree, 0.25, options.device)
        inputs = Inputs(options)
        width = options.features
        given = (
            inputs.features(nodes, width), inputs.mask(g), torch.full((1,), 1.3, dtype=inputs.wide, device=options.device),
            inputs.features(g.num_edges, EDGE_FEATURES), inputs.learned(width, EDGE_FEATURES, scale=0.3),
            inputs.learned(width, scale=0.3),
        )  # fmt: skip
        function = gen_function(g, "softmax", "t", True)
        dy = inputs.features(nodes, width)
        calls = {
            "acefast": forward_backward(function, given, [0, 1, 2, 4, 5], dy),
            "torch by hand": forward_backward(peers.gen(g, "softmax", True)["torch by hand"], given, [0, 1, 2, 4, 5], dy),
        }
        rows = compare(
            calls, lambda a, b: close(a, b, DTYPES[options.dtype]), options.device, options.budget, options.copy_bytes_per_s,
            op="memory", variant=f"gen with edge encoder, mean degree {g.num_edges // nodes}", shape=f"N={nodes} E={g.num_edges} F={width}",
            case="fwd+bwd", dtype=options.dtype, nodes=nodes, edges=g.num_edges, features=width,
        )  # fmt: skip
        item = inputs.dtype.itemsize
        for index, row in enumerate(rows):
            if row.peak_bytes is not None:
                times_n, times_e = (row.peak_bytes / (count * width * item) for count in (nodes, g.num_edges))
                note = f"peak = {times_n:.2f} N*F = {times_e:.3f} E*F" + (f"; {row.note}" if row.note else "")
                rows[index] = dataclasses.replace(row, note=note)
        yield rows


def topk_groups(options) -> Iterator[list[Row]]:
    for count in (10**6, 10**7, 10**8):
        count = round(count * min(1.0, options.scale or 1.0))
        for kind in ("random", "fresh mask"):
            scores = torch.rand(count, generator=torch.Generator().manual_seed(1))
            if kind == "fresh mask":
                scores = 1 + (scores - 0.5) * 2e-5
            scores, k = scores.to(options.device), count // 5
            implementations = ours_on(options.device, "topk_mask", lambda: ops.topk_mask([scores], k, largest=False)[0])
            yield compare(
                implementations | peers.topk_mask(scores, k), lambda a, b: torch.equal(a, b) or same_values(scores, a, b),
                options.device, options.budget, options.copy_bytes_per_s, 5 * count,
                op="topk_mask", variant=kind, shape=f"n={count} k={k}", case="fwd", dtype="float32",
            )  # fmt: skip


def prune_groups(options) -> Iterator[list[Row]]:
    """Pruning of a model's weights, each call on a fresh copy that is made outside of its time."""
    width = max(2, round(PRUNED_WIDTH * min(1.0, options.scale or 1.0) ** 0.5))
    torch.manual_seed(0)
    layers = [torch.nn.Linear(width, width, bias=False) for _ in range(PRUNED_LAYERS)]
    model = torch.nn.Sequential(*layers).to(options.device, DTYPES[options.dtype])
    given = [layer.weight.detach() for layer in model]
    fresh = [model]

    def prepare():
        fresh[0] = copy.deepcopy(model)

    def weights_after(prune):
        def call():
            prune(fresh[0])
            return [layer.weight.detach() for layer in fresh[0]]

        return call

    ours = ours_on(options.device, "topk_mask", weights_after(lambda m: global_magnitude_(m, PRUNED_SHARE)))
    others = {name: weights_after(prune) for name, prune in peers.prune(PRUNED_SHARE).items()}
    count = sum(w.numel() for w in given)
    yield compare(
        ours | others, lambda a, b: same_pruning(given, a, b), options.device, options.budget, options.copy_bytes_per_s,
        2 * count * given[0].element_size(), prepare=prepare, op="prune", variant=f"{PRUNED_SHARE:.0%} of all weights",
        shape=f"{PRUNED_LAYERS} layers, n={count}", case="fwd", dtype=options.dtype,
    )  # fmt: skip


def masked_adam_groups(options) -> Iterator[list[Row]]:
    """A first step on both factors and the new product, each call on fresh copies that are made outside of its time."""
    for count, l1 in itertools.product((10**6, 10**7), (0.0, 1e-2)):
        settings = ops.AdamSettings(lr=1e-2), ops.AdamSettings(lr=1e-3, l1=l1)
        size = max(1, round(count * min(1.0, options.scale or 1.0)) // ADAM_TENSORS)
        inputs = Inputs(options)
        theta, mask, grad = ([inputs.learned(size) for _ in range(ADAM_TENSORS)] for _ in range(3))
        state, weight, others = [], [], {}
        step = torch.zeros(1, dtype=torch.int64, device=options.device)

        def prepare(theta=theta, mask=mask, state=state, weight=weight, others=others, settings=settings, step=step):
            moments = [tuple([torch.zeros_like(t) for t in theta] for _ in range(2)) for _ in range(2)]
            state[:] = [t.clone() for t in theta], [t.clone() for t in mask], *moments
            others |= peers.masked_adam(*state, settings)
            weight[:] = [torch.zeros_like(t) for t in theta]  # as a module holds it
            step.zero_()

        def ours(grad=grad, state=state, weight=weight, settings=settings, step=step):
            ops.masked_adam(grad, *state, step, *settings, weight=weight)
            return *state[0], *state[1], *weight

        def theirs(name, grad=grad, state=state, others=others):
            def call():
                weight = others[name](grad)
                return *state[0], *state[1], *weight

            return call

        prepare()
        yield compare(
            ours_on(options.device, "masked_adam", ours) | {name: theirs(name) for name in others},
            lambda a, b, dtype=inputs.wide: close(a, b, dtype), options.device, options.budget, options.copy_bytes_per_s,
            14 * ADAM_TENSORS * size * inputs.wide.itemsize, prepare=prepare, op="masked_adam",
            variant="theta and mask" + (", L1 of the mask" if l1 else ""), shape=f"{ADAM_TENSORS} tensors, n={ADAM_TENSORS * size}",
            case="fwd", dtype=str(inputs.wide).removeprefix("torch."),
        )  # fmt: skip


def same_pruning(given, a, b) -> bool:
    """As many zeros and the same weights, but for ties: where they differ, the weight has the one magnitude of the
    threshold."""
    zeros = [sum(int((w == 0).sum()) for w in weights) for weights in (a, b)]
    apart = torch.cat([w[x != y].abs() for w, x, y in zip(given, a, b, strict=True)])
    return zeros[0] == zeros[1] and (not apart.numel() or bool((apart == apart[0]).all()))


def same_values(scores, a, b) -> bool:
    """torch.topk and kthvalue promise nothing on ties: the same number of picks with the same scores counts as equal."""
    return bool(a.sum() == b.sum()) and bool(torch.equal(scores[a].sort().values, scores[b].sort().values))


CASES = {
    "spmm": spmm_cases,
    "gat": gat_cases,
    "gen": gen_cases,
    "edge_softmax": edge_softmax_cases,
    "sddmm": sddmm_cases,
    "gcn_norm": gcn_norm_cases,
    "topk_mask": topk_groups,
    "prune": prune_groups,
    "masked_adam": masked_adam_groups,
    "selection": selection_groups,
    "memory": memory_groups,
}
WITHOUT_GRAPH = ("topk_mask", "prune", "masked_adam", "memory")
