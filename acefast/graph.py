"""Graph: an immutable edge set in CSR by destination and CSC by source, with conversions from and to its neighbours."""

import hashlib
from collections.abc import Iterator

import torch
import torch.utils._pytree
from torch import Tensor

from acefast.errors import InputError

_INT32_MAX = 2**31 - 1


def _compress(index: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """Offsets int64 [size+1] of each value of `index` [E], and the stable order that sorts it (None if it is sorted)."""
    offsets = torch.zeros(size + 1, dtype=torch.int64, device=index.device)
    torch.cumsum(torch.bincount(index, minlength=size), 0, out=offsets[1:])
    if index.numel() < 2 or bool((index[1:] >= index[:-1]).all()):
        return offsets, None
    return offsets, torch.sort(index, stable=True).indices


class Graph:
    """Directed edges e from src(e) in [0, N_src) to dst(e) in [0, N_dst), in the caller's order.

    Square and bipartite graphs, isolated nodes, self-loops, multi-edges and an empty edge set are all valid. Every
    per-edge tensor that crosses the API is indexed by the caller's edge number; the graph keeps the permutations.

    Attributes (treat as read-only):
        rowptr  int64 [N_dst+1]  slots of the edges into each destination (CSR)
        col     [E]              source of each CSR slot
        eid     [E] or None      caller's edge number of each CSR slot; None where it is the slot itself
        colptr  int64 [N_src+1]  slots of the edges out of each source (CSC)
        row     [E]              destination of each CSC slot
        ceid    [E] or None      caller's edge number of each CSC slot; None where it is the slot itself
        edge_ids [E] or None     after `compact`: the edge number in the graph it was made from

    col, row, eid and ceid are int32 where every node and edge number fits, int64 otherwise. Within a row and within a
    column slots follow the caller's order.
    """

    def __init__(self, rowptr, col, eid, colptr, row, ceid, edge_ids=None):
        self.rowptr, self.col, self.eid = rowptr, col, eid
        self.colptr, self.row, self.ceid = colptr, row, ceid
        self.edge_ids = edge_ids
        self._edge_index: Tensor | None = None
        self._fingerprint: str | None = None
        self._self_loops: Tensor | None = None
        self._missing_self_loops: Tensor | None = None
        self._with_self_loops: Graph | None = None
        self._reverse_edges: Tensor | None = None

    @staticmethod
    def from_edge_index(edge_index: Tensor, num_nodes: int | tuple[int, int] | None = None) -> "Graph":
        """Graph of `edge_index` [2, E] (int32 or int64; row 0 source, row 1 destination, as in PyG).

        `num_nodes` is N, or (N_src, N_dst) for a bipartite graph; without it, the largest index + 1. All checks that
        cost O(E) are made here, once. Raises InputError for a wrong shape or dtype and for an index out of range.
        """
        if not isinstance(edge_index, Tensor) or edge_index.dtype not in (torch.int32, torch.int64):
            got = edge_index.dtype if isinstance(edge_index, Tensor) else type(edge_index).__name__
            raise InputError(f"edge_index must be an int32 or int64 tensor [2, E], got {got}")
        if edge_index.dim() != 2 or edge_index.size(0) != 2:
            raise InputError(f"edge_index must have shape [2, E], got {list(edge_index.shape)}")
        src, dst = edge_index[0].long(), edge_index[1].long()
        num_edges = src.numel()
        high = [int(index.max()) if num_edges else -1 for index in (src, dst)]
        if num_nodes is None:
            num_nodes = max(high) + 1
        num_src, num_dst = num_nodes if isinstance(num_nodes, tuple | list) else (num_nodes, num_nodes)
        for what, index, top, count in (("source", src, high[0], num_src), ("destination", dst, high[1], num_dst)):
            if count < 0:
                raise InputError(f"num_nodes must not be negative, got {count}")
            low = int(index.min()) if num_edges else 0
            if low < 0 or top >= count:
                bad = low if low < 0 else top
                raise InputError(f"edge_index: {what} index {bad} is out of range for {count} {what} nodes")
        loops = (src == dst).nonzero().squeeze(1)
        narrow = max(num_src, num_dst, num_edges) <= _INT32_MAX
        dtype = torch.int32 if narrow else torch.int64
        rowptr, order = _compress(dst, num_dst)
        colptr, corder = _compress(src, num_src)
        g = Graph(
            rowptr,
            (src if order is None else src[order]).to(dtype),
            None if order is None else order.to(dtype),
            colptr,
            (dst if corder is None else dst[corder]).to(dtype),
            None if corder is None else corder.to(dtype),
        )
        g._self_loops = torch.stack((loops, dst[loops]))
        return g

    def __repr__(self):
        return f"Graph(num_nodes={self.num_nodes}, num_edges={self.num_edges}, device={self.device})"

    @property
    def arrays(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
        """(rowptr, col, eid, colptr, row, ceid): the graph as the ops take it."""
        return self.rowptr, self.col, self.eid, self.colptr, self.row, self.ceid

    @property
    def num_edges(self) -> int:
        return self.col.numel()

    @property
    def num_src(self) -> int:
        return self.colptr.numel() - 1

    @property
    def num_dst(self) -> int:
        return self.rowptr.numel() - 1

    @property
    def num_nodes(self) -> int | tuple[int, int]:
        """N, or (N_src, N_dst) where they differ."""
        return self.num_src if self.num_src == self.num_dst else (self.num_src, self.num_dst)

    @property
    def device(self) -> torch.device:
        return self.col.device

    def edge_index(self) -> Tensor:
        """[2, E] int64 in the caller's order; row 0 source, row 1 destination. Made once and kept, 16 bytes an edge."""
        if self._edge_index is None:
            self._edge_index = self._make_edge_index()
        return self._edge_index

    def _make_edge_index(self) -> Tensor:
        dst = torch.arange(self.num_dst, device=self.device)
        dst = torch.repeat_interleave(dst, self.in_degrees(), output_size=self.num_edges)
        edges = torch.stack((self.col.long(), dst))
        if self.eid is not None:
            ordered = torch.empty_like(edges)
            ordered[:, self.eid.long()] = edges
            edges = ordered
        return edges

    def pieces(self, edges: int = 2**20) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All edges by destination, about so many at a time, as (their numbers, sources, destinations), int64: for what is
        summed over edges or written for each, without [2, E] at once."""
        starts = torch.arange(0, self.num_edges, edges, device=self.device)
        rows = torch.unique(torch.searchsorted(self.rowptr, starts, right=True) - 1).tolist()
        for begin, end in zip(rows, [*rows[1:], self.num_dst], strict=False):
            first, last = int(self.rowptr[begin]), int(self.rowptr[end])
            count = self.rowptr[begin + 1 : end + 1] - self.rowptr[begin:end]
            dst = torch.repeat_interleave(torch.arange(begin, end, device=self.device), count, output_size=last - first)
            slots = torch.arange(first, last, device=self.device)
            yield slots if self.eid is None else self.eid[first:last].long(), self.col[first:last].long(), dst

    def in_degrees(self) -> Tensor:
        """Number of edges into each destination, int64 [N_dst]."""
        return self.rowptr[1:] - self.rowptr[:-1]

    def out_degrees(self) -> Tensor:
        """Number of edges out of each source, int64 [N_src]."""
        return self.colptr[1:] - self.colptr[:-1]

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the node counts and the edges in the caller's order: what a ticket is bound to."""
        if self._fingerprint is None:
            digest = hashlib.sha256(f"{self.num_src} {self.num_dst} {self.num_edges}".encode())
            for side in (1, 2):  # sources, then destinations
                ordered = None if self.eid is None else torch.empty_like(self.col)
                for piece in self.pieces():
                    if ordered is None:
                        digest.update(piece[side].cpu().numpy())
                    else:
                        ordered[piece[0]] = piece[side].to(ordered.dtype)
                for part in () if ordered is None else ordered.split(2**20):
                    digest.update(part.long().cpu().numpy())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def to(self, device) -> "Graph":
        if torch.device(device) == self.device:
            return self
        parts = (*self.arrays, self.edge_ids, self._self_loops, self._reverse_edges)
        moved = {id(t): t.to(device) for t in parts if t is not None}  # an undirected graph has the same arrays both ways
        *parts, reverse = (None if t is None else moved[id(t)] for t in parts)
        g = _graph_of(parts, None)
        g._reverse_edges = reverse
        return g

    def self_loops(self) -> Tensor:
        """The self-loops among the edges, int64 [2, L]: edge numbers (row 0) and nodes (row 1)."""
        if self._self_loops is None:
            if torch.compiler.is_compiling():
                raise InputError("self_loops must be known before compiling: call graph.self_loops() outside, once")
            src, dst = self.edge_index()
            loops = (src == dst).nonzero().squeeze(1)
            self._self_loops = torch.stack((loops, dst[loops]))
        return self._self_loops

    def reverse_edges(self) -> Tensor:
        """The number of each edge's reverse [E]: of the n-th edge i -> j the n-th edge j -> i, in the caller's order.
        A self-loop and an edge without a reverse are their own. Made once, O(E log E). Raises InputError for a bipartite
        graph."""
        if self._reverse_edges is None:
            if self.num_src != self.num_dst:
                raise InputError(f"reverse_edges: a bipartite graph {self.num_nodes} has no reverse edges")
            src, dst = self.edge_index()
            edges = torch.arange(self.num_edges, device=self.device)
            keys, order = torch.sort(src * self.num_dst + dst, stable=True)
            wanted = (dst * self.num_src + src)[order]
            slot = torch.searchsorted(keys, wanted) + edges - torch.searchsorted(keys, keys)
            inside, slot = slot < self.num_edges, slot.clamp(max=self.num_edges - 1)
            found = inside & (keys[slot] == wanted) & (keys != wanted)
            reverse = torch.empty_like(edges)
            reverse[order] = order.where(~found, order[slot])
            self._reverse_edges = reverse.to(self.col.dtype)
        return self._reverse_edges

    def missing_self_loops(self, keep: "Tensor | Selection | None" = None) -> Tensor:
        """Which nodes have no (kept) self-loop among the edges, bool [N]; made once for the whole graph and for a selection.
        Raises InputError for a bipartite graph."""
        if self.num_src != self.num_dst:
            raise InputError(f"missing_self_loops: self-loops need a square graph, this one is bipartite {self.num_nodes}")
        owner = self if keep is None else keep if isinstance(keep, Selection) else None
        if owner is not None and owner._missing_self_loops is not None:
            return owner._missing_self_loops
        edges, nodes = self.self_loops()
        keep = keep.keep if isinstance(keep, Selection) else keep
        kept = torch.ones_like(edges) if keep is None else keep[edges].long()
        missing = torch.zeros(self.num_dst, dtype=torch.int64, device=self.device).index_add_(0, nodes, kept) == 0
        if owner is not None and not torch.compiler.is_compiling():
            owner._missing_self_loops = missing
        return missing

    def with_self_loops(self) -> "Graph":
        """This graph with one more self-loop for every node i, the edge number num_edges + i; made once, O(E)."""
        if self._with_self_loops is None:
            if self.num_src != self.num_dst:
                raise InputError(f"with_self_loops: self-loops need a square graph, this one is bipartite {self.num_nodes}")
            nodes, loops = torch.arange(self.num_dst, device=self.device), self.num_edges + torch.arange(self.num_dst, device=self.device)
            dtype = self.col.dtype if self.num_edges + self.num_dst <= _INT32_MAX else torch.int64

            def side(ptr, other, ids):
                """A loop takes the last slot of its row: slot s of row i moves to s + i."""
                shift = torch.repeat_interleave(nodes, ptr[1:] - ptr[:-1], output_size=self.num_edges)
                slots = torch.arange(self.num_edges, device=self.device)
                values = [torch.empty(self.num_edges + self.num_dst, dtype=dtype, device=self.device) for _ in range(2)]
                longer = ptr + torch.arange(self.num_dst + 1, device=self.device)
                for value, old, own in zip(values, (other, slots if ids is None else ids), (nodes, loops), strict=True):
                    value[slots + shift] = old.to(dtype)
                    value[longer[1:] - 1] = own.to(dtype)
                return longer, *values

            looped = Graph(*side(self.rowptr, self.col, self.eid), *side(self.colptr, self.row, self.ceid))
            looped._self_loops = torch.cat((self.self_loops(), torch.stack((loops, nodes))), 1)
            self._with_self_loops = looped
        return self._with_self_loops

    def _checked_keep(self, keep: "Tensor | Selection") -> Tensor:
        if isinstance(keep, Selection):
            keep = keep.keep
        if keep.dtype != torch.bool or keep.shape != (self.num_edges,) or keep.device != self.device:
            raise InputError(
                f"keep must be bool [{self.num_edges}] on {self.device}, got {keep.dtype} {list(keep.shape)} on {keep.device}"
            )
        return keep.contiguous()

    def compact(self, keep: "Tensor | Selection", num_kept: int | None = None) -> "Graph":
        """The graph of the edges with keep[e] True (`keep` bool [E]), in the caller's order, nodes unchanged; O(E), no sort.

        `edge_ids` [E_kept] of the result holds their numbers here. With `num_kept` (the number of True) nothing is
        copied to the host. Raises InputError for a wrong `keep`.
        """
        keep = self._checked_keep(keep)
        num_kept = int(keep.sum()) if num_kept is None else num_kept
        rowptr, col, eid, colptr, row, ceid, edge_ids = torch.ops.acefast.compact(*self.arrays, keep, num_kept, True)
        eid, ceid = None if self.eid is None else eid, None if self.ceid is None else ceid
        return Graph(rowptr, col, eid, colptr, row, ceid, edge_ids=edge_ids)

    def select(self, keep: Tensor, num_kept: int | None = None) -> "Selection":
        """The pattern `keep` (bool [E]) prepared once for many calls: ops take it wherever they take `keep` and then visit
        the kept edges alone. O(E), no sort; `num_kept` as for `compact`. Raises InputError for a wrong `keep`."""
        keep = self._checked_keep(keep)
        num_kept = int(keep.sum()) if num_kept is None else num_kept
        *arrays, _ = torch.ops.acefast.compact(*self.arrays, keep, num_kept, False)
        return Selection(self, keep, *arrays)

    def blocks(self, nodes: Tensor, hops: int, keep: "Tensor | Selection | None" = None) -> "list[Block]":
        """What `hops` layers of message passing over the kept edges need for their results at `nodes` alone, as one
        :class:`Block` for each layer, the first layer's first (message flow graphs; DGL's `to_block`, with all neighbours).

        The last block's destinations are `nodes` (int64, distinct) in their order, a block's sources the block before's
        destinations. O(N + edges visited log) for each hop. Raises InputError for a bipartite graph and a wrong `keep`.
        """
        if self.num_src != self.num_dst:
            raise InputError(f"blocks: layers need a square graph, this one is bipartite {self.num_nodes}")
        if keep is not None and not isinstance(keep, Selection):
            keep = self.select(keep)
        blocks = []
        for _ in range(hops):
            blocks.insert(0, Block(self, nodes, keep))
            nodes = blocks[0].src_nodes
        return blocks

    # Neighbours. Each conversion imports its library when called.

    @staticmethod
    def from_scipy(matrix) -> "Graph":
        """An entry (s, d) of the sparse matrix is the edge s -> d, as in PyG; values are not taken."""
        coo = matrix.tocoo()
        edges = torch.stack((torch.from_numpy(coo.row).long(), torch.from_numpy(coo.col).long()))
        return Graph.from_edge_index(edges, num_nodes=coo.shape)

    def to_scipy(self, value: Tensor | None = None):
        """scipy.sparse.coo_matrix [N_src, N_dst] with `value` [E] (default ones) at (source, destination)."""
        import scipy.sparse

        src, dst = self.edge_index().cpu().numpy()
        value = torch.ones(self.num_edges) if value is None else value.detach().cpu()
        return scipy.sparse.coo_matrix((value.numpy(), (src, dst)), shape=(self.num_src, self.num_dst))

    @staticmethod
    def from_torch_sparse(adj_t) -> "Graph":
        """From a torch_sparse.SparseTensor whose rows are destinations (PyG's `adj_t`); edges in its row order."""
        dst, src, _ = adj_t.coo()
        return Graph.from_edge_index(torch.stack((src, dst)), num_nodes=(adj_t.size(1), adj_t.size(0)))

    def to_torch_sparse(self, value: Tensor | None = None):
        """torch_sparse.SparseTensor `adj_t` [N_dst, N_src] with `value` [E] (caller's order) or none."""
        from torch_sparse import SparseTensor

        src, dst = self.edge_index()
        return SparseTensor(row=dst, col=src, value=value, sparse_sizes=(self.num_dst, self.num_src))

    @staticmethod
    def from_pyg(data) -> "Graph":
        """From a torch_geometric.data.Data (its `edge_index` and `num_nodes`)."""
        return Graph.from_edge_index(data.edge_index, num_nodes=data.num_nodes)

    def to_pyg(self, **fields):
        """torch_geometric.data.Data with this graph's edge_index and num_nodes and the given fields."""
        from torch_geometric.data import Data

        if self.num_src != self.num_dst:
            raise InputError(f"to_pyg: Data holds square graphs, this one is bipartite {self.num_nodes}")
        return Data(edge_index=self.edge_index(), num_nodes=self.num_src, **fields)

    @staticmethod
    def from_dgl(graph) -> "Graph":
        """From a homogeneous dgl.DGLGraph, edges by DGL's edge number."""
        src, dst = graph.edges(order="eid")
        return Graph.from_edge_index(torch.stack((src, dst)), num_nodes=(graph.num_src_nodes(), graph.num_dst_nodes()))

    def to_dgl(self):
        """dgl.DGLGraph with the same edge numbers."""
        import dgl

        src, dst = self.edge_index()
        if self.num_src == self.num_dst:
            return dgl.graph((src, dst), num_nodes=self.num_src)
        sizes = {"src": self.num_src, "dst": self.num_dst}
        return dgl.heterograph({("src", "to", "dst"): (src, dst)}, num_nodes_dict=sizes)


class Selection:
    """A keep pattern of one graph with the CSR and CSC of the kept edges, from `Graph.select`. Per-edge tensors stay in the
    graph's own edge numbers. Immutable: `keep` [E] must not be changed in place."""

    def __init__(self, graph, keep, rowptr, col, eid, colptr, row, ceid):
        self.graph, self.keep = graph, keep
        self.arrays = (rowptr, col, eid, colptr, row, ceid)
        self._missing_self_loops: Tensor | None = None
        self._with_self_loops: Selection | None = None

    @property
    def num_kept(self) -> int:
        return self.arrays[1].numel()

    @property
    def device(self) -> torch.device:
        return self.keep.device

    def __repr__(self):
        return f"Selection(num_kept={self.num_kept}, num_edges={self.graph.num_edges}, device={self.device})"

    def in_degrees(self) -> Tensor:
        """Number of kept edges into each destination, int64 [N_dst]."""
        rowptr = self.arrays[0]
        return rowptr[1:] - rowptr[:-1]

    def with_self_loops(self) -> "Selection":
        """The same pattern on `graph.with_self_loops()`, an added loop kept where no own loop of the node is; made once."""
        if self._with_self_loops is None:
            missing = self.graph.missing_self_loops(self.keep)
            added = missing.numel() if self.graph.self_loops().numel() == 0 else int(missing.sum())
            keep = torch.cat((self.keep, missing))
            self._with_self_loops = self.graph.with_self_loops().select(keep, self.num_kept + added)
        return self._with_self_loops

    def to(self, device) -> "Selection":
        if torch.device(device) == self.device:
            return self
        return Selection(self.graph.to(device), *(t.to(device) for t in (self.keep, *self.arrays)))


class Block(Graph):
    """The kept edges of `graph` into the nodes `dst_nodes`, as a bipartite graph from the nodes `src_nodes`: what one layer
    reads and writes where its result is wanted at some nodes only.

    Ops and layers take it in place of a graph: x has a row for each source, the result one for each destination. The
    destinations are the first of the sources, so `x[:num_dst]` are their own rows. Per-edge tensors stay those of `graph`,
    [E], indexed by its edge numbers; `num_edges` is that E.

    Attributes: graph; dst_nodes int64 [N_dst], src_nodes int64 [N_src], node numbers in `graph`; arrays as in Graph.
    """

    def __init__(self, graph: Graph, dst_nodes: Tensor, keep: Selection | None = None):
        rowptr, col, eid, *_ = graph.arrays if keep is None else keep.arrays
        first, count = rowptr[dst_nodes], rowptr[dst_nodes + 1] - rowptr[dst_nodes]
        offsets = torch.zeros(dst_nodes.numel() + 1, dtype=torch.int64, device=graph.device)
        torch.cumsum(count, 0, out=offsets[1:])
        row = torch.repeat_interleave(torch.arange(dst_nodes.numel(), device=graph.device), count)
        slots = torch.arange(row.numel(), device=graph.device) + (first - offsets[:-1])[row]
        src, ids = col[slots].long(), slots if eid is None else eid[slots].long()
        outside = torch.zeros(graph.num_src, dtype=torch.bool, device=graph.device)
        outside[src] = True
        outside[dst_nodes] = False
        self.graph, self.dst_nodes = graph, dst_nodes
        self.src_nodes = torch.cat((dst_nodes, outside.nonzero().squeeze(1)))
        number = torch.empty(graph.num_src, dtype=torch.int64, device=graph.device)
        number[self.src_nodes] = torch.arange(self.src_nodes.numel(), device=graph.device)
        src = number[src]
        order = torch.sort(ids).indices
        order = order[torch.sort(src[order], stable=True).indices]
        colptr = torch.zeros(self.src_nodes.numel() + 1, dtype=torch.int64, device=graph.device)
        torch.cumsum(torch.bincount(src, minlength=self.src_nodes.numel()), 0, out=colptr[1:])
        narrow = (t.to(graph.col.dtype) for t in (src, ids, row[order], ids[order]))
        col, eid, row, ceid = narrow
        super().__init__(offsets, col, eid, colptr, row, ceid)

    @property
    def num_edges(self) -> int:
        return self.graph.num_edges

    def _of_the_graph(self, *_):
        raise InputError("a Block has no edge set of its own: ask the graph that it is a part of, block.graph")

    edge_index = fingerprint = to = self_loops = reverse_edges = missing_self_loops = with_self_loops = _of_the_graph
    compact = select = blocks = to_scipy = to_torch_sparse = to_pyg = to_dgl = _of_the_graph


def _graph_of(tensors, _):
    *arrays, edge_ids, loops = tensors
    g = Graph(*arrays, edge_ids)
    g._self_loops = loops
    return g


def _register(cls, parts_of, rebuild) -> None:
    """Compiled and exported code takes graphs and selections as what they are: records of tensors."""

    def with_keys(record):
        return [(torch.utils._pytree.SequenceKey(i), part) for i, part in enumerate(parts_of(record))], None

    torch.utils._pytree.register_pytree_node(
        cls,
        lambda record: (parts_of(record), None),
        rebuild,
        serialized_type_name=f"acefast.{cls.__name__}",
        flatten_with_keys_fn=with_keys,
    )


_register(Graph, lambda g: (*g.arrays, g.edge_ids, g._self_loops), _graph_of)
_register(Selection, lambda s: (s.graph, s.keep, *s.arrays), lambda parts, _: Selection(*parts))
