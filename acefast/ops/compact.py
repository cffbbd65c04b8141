"""compact: the kept slots of a graph's CSR and CSC, behind `Graph.compact` and `Graph.select`."""

import torch

from acefast.ops import backend  # noqa: F401  (backend defines the schemas)


@torch.library.register_fake("acefast::compact")
def _(rowptr, col, eid, colptr, row, ceid, keep, num_kept, renumber):
    def side(ptr, other, ids):
        named = other.new_empty(0 if renumber and ids is None else num_kept)
        return torch.empty_like(ptr), other.new_empty(num_kept), named

    edge_ids = keep.new_empty(num_kept if renumber else 0, dtype=torch.int64)
    return *side(rowptr, col, eid), *side(colptr, row, ceid), edge_ids
