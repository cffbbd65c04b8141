"""`python -m bench ops`: the ops against their peers, forward and backward, in one run."""

import dataclasses
import json
from pathlib import Path

import torch

from acefast import Graph, ops
from bench import graphs
from bench.harness import Row, compare, copy_bandwidth, environment

FEATURES = 128


@dataclasses.dataclass(frozen=True)
class OpsBenchmark:
    """Time the ops against torch and, where they are installed, torch_sparse and torch_scatter. Every implementation is
    checked to be equal to ours before it is timed."""

    op: tuple[str, ...] = ("spmm", "topk_mask")
    """Which ops."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int | None = None
    """CPU threads; default: what torch takes."""
    data_root: Path | None = None
    """Folder with ogb/ogbn_arxiv; without it a generated twin of the same size is used."""
    json: Path | None = None
    """Write the rows to this file."""

    def run(self) -> int:
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        unknown = set(self.op) - set(CASES)
        if unknown:
            raise SystemExit(f"bench: unknown op {sorted(unknown)}; known are {sorted(CASES)}")
        head = environment() | {"copy_bytes_per_s": copy_bandwidth(self.device)}
        print("  ".join(f"{key}={value}" for key, value in head.items()))
        rows = []
        for name in self.op:
            for group in CASES[name](self):
                print_group(group)
                rows += group
        if self.json is not None:
            self.json.parent.mkdir(parents=True, exist_ok=True)
            self.json.write_text(json.dumps({"environment": head, "rows": [row.to_json() for row in rows]}, indent=1) + "\n")
            print(f"written: {self.json}")
        return 0


def print_group(rows: list[Row]) -> None:
    ours = rows[0]
    print(f"\n{ours.op} {ours.case}  {ours.shape}  {ours.dtype}  {ours.device}")
    for row in rows:
        if row.repeats:
            figures = f"{row.median_s * 1e3:10.2f} ms  (min {row.min_s * 1e3:.2f}, n={row.repeats})  peak {row.peak_bytes / 2**20:8.1f} MiB"
            print(f"  {row.impl:<28}{figures}  {row.median_s / ours.median_s:7.2f} x ours")
        else:
            print(f"  {row.impl:<28}not timed: {row.note}")


def close(a, b) -> bool:
    pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
    return all(float((x - y).norm()) <= 1e-5 * float(x.norm()) + 1e-30 for x, y in pairs)


def spmm_cases(options: OpsBenchmark):
    name, g = graphs.arxiv(options.data_root)
    g = g.to(options.device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(g.num_src, FEATURES, generator=generator).to(options.device)
    mask = torch.rand(g.num_edges, generator=generator).to(options.device)
    dy = torch.randn(g.num_dst, FEATURES, generator=generator).to(options.device)
    shape = f"{name} N={g.num_src} E={g.num_edges} F={FEATURES}"
    peers = spmm_peers(g)

    def forward(function):
        def call():
            with torch.no_grad():
                return function(x, mask)

        return call

    def both(function):
        def call():
            leaves = x.detach().requires_grad_(), mask.detach().requires_grad_()
            y = function(*leaves)
            return y.detach(), *torch.autograd.grad(y, leaves, dy)

        return call

    ours = {"acefast": lambda x, mask: ops.spmm(g, x, mask=mask)}
    yield compare("spmm", shape, "fwd", "float32", options.device, {k: forward(f) for k, f in (ours | peers).items()}, close)
    yield compare("spmm", shape, "fwd+bwd", "float32", options.device, {k: both(f) for k, f in (ours | peers).items()}, close)


def spmm_peers(g: Graph) -> dict:
    """The same product the ways that are in use; all take (x, mask) with the mask in the graph's CSR order."""
    assert g.eid is None, "the benchmark's graphs are in CSR order"
    src, dst = g.edge_index()

    def torch_csr(x, mask):
        return torch.sparse_csr_tensor(g.rowptr, g.col.long(), mask, (g.num_dst, g.num_src)) @ x

    def index_add(x, mask):
        y = torch.zeros(g.num_dst, x.size(1), dtype=x.dtype, device=x.device)
        return y.index_add(0, dst, mask.unsqueeze(1) * x[src])

    def scatter_reduce(x, mask):
        y = torch.zeros(g.num_dst, x.size(1), dtype=x.dtype, device=x.device)
        return y.scatter_add(0, dst.unsqueeze(1).expand(-1, x.size(1)), mask.unsqueeze(1) * x[src])

    peers = {"torch CSR": torch_csr, "gather-multiply-index_add": index_add, "gather-multiply-scatter_add": scatter_reduce}
    try:
        import torch_sparse
    except ImportError:
        return peers
    adj = torch_sparse.SparseTensor(rowptr=g.rowptr, col=g.col.long(), sparse_sizes=(g.num_dst, g.num_src), is_sorted=True)
    adj.storage.csr2csc(), adj.storage.colptr()
    return peers | {"torch_sparse": lambda x, mask: torch_sparse.matmul(adj.set_value(mask, layout="coo"), x)}


def topk_cases(options: OpsBenchmark):
    for count in (10**6, 10**7):
        for kind in ("random", "fresh mask"):
            generator = torch.Generator().manual_seed(1)
            scores = torch.rand(count, generator=generator)
            if kind == "fresh mask":
                scores = 1 + (scores - 0.5) * 2e-5
            scores = scores.to(options.device)
            k = count // 5
            yield compare(
                "topk_mask", f"{kind} n={count} k={k}", "fwd", "float32", options.device, topk_implementations(scores, k),
                lambda a, b, scores=scores: bool(torch.equal(a, b)) or same_values(scores, a, b),
            )  # fmt: skip


def same_values(scores, a, b) -> bool:
    """torch.topk and kthvalue promise nothing on ties: the same number of picks with the same scores counts as equal."""
    return bool(a.sum() == b.sum()) and bool(torch.equal(scores[a].sort().values, scores[b].sort().values))


def topk_implementations(scores: torch.Tensor, k: int) -> dict:
    def mask_of(index):
        return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, index, True)

    def kthvalue():
        threshold = scores.abs().kthvalue(k).values
        mask = scores.abs() < threshold
        ties = (scores.abs() == threshold).nonzero().squeeze(1)
        return mask.index_fill_(0, ties[: k - int(mask.sum())], True)

    return {
        "acefast": lambda: ops.topk_mask([scores], k, largest=False)[0],
        "torch.sort (stable)": lambda: mask_of(torch.sort(scores.abs(), stable=True).indices[:k]),
        "torch.sort": lambda: mask_of(torch.sort(scores.abs()).indices[:k]),
        "torch.topk": lambda: mask_of(torch.topk(scores.abs(), k, largest=False, sorted=False).indices),
        "torch.kthvalue": kthvalue,
    }


CASES = {"spmm": spmm_cases, "topk_mask": topk_cases}
