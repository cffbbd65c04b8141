"""The winning ticket as a record and as a file.

File format, version 1: one safetensors file with
    edge_keep            uint8 [ceil(E / 8)]   edge e of the caller's order is bit e % 8 of byte e // 8; spare bits 0
    weight_keep/<name>   uint8 [ceil(n / 8)]   the same over the flattened weight <name>
    rewind/<name>        float [shape]         the parameter or buffer before training
and one metadata entry "acefast.ticket": JSON with format, edges, weights {name: shape}, metadata and digest, the
SHA-256 of all the rest. The same content gives the same bytes.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from acefast.errors import InputError
from acefast.files import write_atomic

FORMAT = 1
HEADER = "acefast.ticket"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(eq=False)
class Ticket:
    """A subgraph, a subnetwork and the weights to start it from.

    edge_keep    bool [E]            edges kept, in the order of the graph's edge_index
    weight_keep  {name: bool}        weights kept, one mask per masked parameter, in its shape
    rewind       {name: float}       every parameter, and what buffers the training changes, at its start
    metadata     JSON values         dataset, fingerprint (`Graph.fingerprint()` of the graph), backbone, method,
                                     preset, axes, round, seed, val, test, config_hash, acefast_version, and more

    Raises InputError where these do not fit together: wrong dtypes, a mask for a parameter that is not in `rewind` or
    in another shape, values that are not finite, no fingerprint.
    """

    edge_keep: Tensor
    weight_keep: dict[str, Tensor]
    rewind: dict[str, Tensor]
    metadata: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.edge_keep.dtype != torch.bool or self.edge_keep.dim() != 1:
            raise InputError(
                f"Ticket: edge_keep must be bool [E], got {self.edge_keep.dtype} {list(self.edge_keep.shape)}"
            )
        for name, value in self.rewind.items():
            if value.dtype not in FLOATS:
                raise InputError(f"Ticket: rewind weight {name} must be floating point, got {value.dtype}")
            if not torch.isfinite(value).all():
                raise InputError(f"Ticket: rewind weight {name} must be finite, got NaN or infinite values")
        for name, keep in self.weight_keep.items():
            if name not in self.rewind:
                raise InputError(f"Ticket: weight mask {name} has no rewind weight of that name")
            if keep.dtype != torch.bool or keep.shape != self.rewind[name].shape:
                raise InputError(
                    f"Ticket: weight mask {name} must be bool {list(self.rewind[name].shape)} like its rewind weight, "
                    f"got {keep.dtype} {list(keep.shape)}"
                )
        if not isinstance(self.metadata.get("fingerprint"), str):
            raise InputError("Ticket: metadata must hold the text 'fingerprint', the graph's Graph.fingerprint()")

    def __repr__(self):
        counts, removed = self.counts, self.sparsity
        axes = (f"{axis}={kept}/{total} (-{removed[axis]:.2f} %)" for axis, (kept, total) in counts.items())
        return f"Ticket({', '.join(axes)})"

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """(kept, total) of "edges" and of "weights"."""
        weights = self.weight_keep.values()
        return {
            "edges": (int(self.edge_keep.sum()), self.edge_keep.numel()),
            "weights": (sum(int(keep.sum()) for keep in weights), sum(keep.numel() for keep in weights)),
        }

    @property
    def sparsity(self) -> dict[str, float]:
        """Removed / total in percent, of "edges" and of "weights"; 0 where there is nothing to remove."""
        return {axis: 100.0 * (total - kept) / total if total else 0.0 for axis, (kept, total) in self.counts.items()}

    def graph(self, g):
        """The kept subgraph of `g` as a Graph, its edges in the order of `g.edge_index()`.

        Raises InputError where `g` is not the graph that the ticket was found on.
        """
        self.check_graph(g)
        return type(g).from_edge_index(g.edge_index()[:, self.edge_keep.to(g.device)], num_nodes=g.num_nodes)

    def check_graph(self, g) -> None:
        """Raises InputError where `g` is not the graph that the ticket was found on."""
        expected, got = self.metadata["fingerprint"], g.fingerprint()
        if expected != got or g.num_edges != self.edge_keep.numel():
            raise InputError(
                f"this is a ticket for another graph: it was found on {self.metadata.get('dataset', 'a graph')} with "
                f"{self.edge_keep.numel()} edges and fingerprint {expected[:12]}, the graph given has {g.num_edges} "
                f"edges and fingerprint {got[:12]}; give the graph that the ticket was found on"
            )

    def check_model(self, model: nn.Module) -> None:
        """Raises InputError where a parameter is missing on either side, a buffer in the model, or one has another shape."""
        parameters, state = dict(model.named_parameters()), model.state_dict()
        missing, surplus = sorted(self.rewind.keys() - state), sorted(parameters.keys() - self.rewind.keys())
        if missing or surplus:
            what = f"has no parameter {missing[0]}" if missing else f"has the parameter {surplus[0]}, not in the ticket"
            raise InputError(f"the ticket does not fit this model: the model {what}; build the backbone of the ticket")
        for name, value in self.rewind.items():
            if state[name].shape != value.shape:
                raise InputError(
                    f"the ticket does not fit this model: {name} has shape {list(state[name].shape)} in the model "
                    f"and {list(value.shape)} in the ticket; build the model with the ticket's sizes"
                )

    @torch.no_grad()
    def apply(self, model: nn.Module) -> nn.Module:
        """Set the rewind weights and the masks in `model` and return it.

        Parameters are matched by name. A masked parameter's module takes the mask by its `set_keep(bool Tensor)` where
        it has one (acefast.nn); in any other module the removed weights are set to 0.

        Raises InputError, and changes nothing, where a parameter is missing on either side or has another shape.
        """
        parameters, state = dict(model.named_parameters()), model.state_dict()
        self.check_model(model)
        for name, value in self.rewind.items():
            state[name].copy_(value)
        for name, keep in self.weight_keep.items():
            owner = model.get_submodule(name.rpartition(".")[0])
            keep = keep.to(parameters[name].device)
            if hasattr(owner, "set_keep"):
                owner.set_keep(keep)
            else:
                parameters[name].mul_(keep)
        return model

    def save(self, path) -> None:
        """Write the ticket to `path` (safetensors), whole or not at all; the same content gives the same bytes.

        Raises InputError where the path cannot be written or the metadata is not JSON.
        """
        tensors = {"edge_keep": pack(self.edge_keep)}
        tensors |= {f"weight_keep/{name}": pack(keep) for name, keep in self.weight_keep.items()}
        for name, value in self.rewind.items():
            tensors[f"rewind/{name}"] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        header = {
            "format": FORMAT,
            "edges": self.edge_keep.numel(),
            "weights": {name: list(keep.shape) for name, keep in self.weight_keep.items()},
            "metadata": self.metadata,
        }
        try:
            header["digest"] = digest(header, tensors)
        except (TypeError, ValueError) as error:
            raise InputError(f"Ticket: metadata must be finite JSON values with text keys: {error}") from None
        write_atomic(path, to_safetensors(tensors, {HEADER: canonical(header)}))

    @classmethod
    def load(cls, path) -> "Ticket":
        """Read a ticket and check all of it.

        Raises InputError where the file is missing, cut short, changed since it was written, of another format, or
        holds anything but a ticket.
        """
        path = Path(path)
        header, tensors = read_safetensors(path)

        def require(condition, what):
            if not condition:
                raise InputError(f"{path} is not a whole ticket: {what}; write it again from its run folder")

        require(isinstance(header, dict), f"its metadata holds no {HEADER}")
        if header.get("format") != FORMAT:
            raise InputError(
                f"{path} is a ticket of format {header.get('format')!r}, this acefast reads format {FORMAT}; read it "
                f"with the acefast that wrote it"
            )
        require(header.keys() == {"format", "edges", "weights", "metadata", "digest"}, "its header has other keys")
        edges, shapes, metadata = header["edges"], header["weights"], header["metadata"]
        require(is_size(edges), f"its number of edges is {edges!r}")
        require(isinstance(shapes, dict) and isinstance(metadata, dict), "its weights or metadata are no JSON objects")
        require(
            all(isinstance(s, list) and all(map(is_size, s)) for s in shapes.values()), "a weight's shape is no list"
        )
        rewind = {name[7:]: value for name, value in tensors.items() if name.startswith("rewind/")}
        packed = {f"weight_keep/{name}": math.prod(shape) for name, shape in shapes.items()} | {"edge_keep": edges}
        names = packed.keys() | {f"rewind/{name}" for name in rewind}
        require(names <= tensors.keys(), f"the tensor {min(names - tensors.keys(), default='')} is missing")
        require(names >= tensors.keys(), f"the tensor {min(tensors.keys() - names, default='')} is no part of a ticket")
        for name, count in packed.items():
            require(
                tensors[name].dtype == torch.uint8 and list(tensors[name].shape) == [(count + 7) // 8],
                f"{name} must be uint8 [{(count + 7) // 8}] for {count} bits, got {tensors[name].dtype} "
                f"{list(tensors[name].shape)}",
            )
            spare = tensors[name][-1].item() >> (count % 8) if count % 8 else 0
            require(spare == 0, f"{name} has bits set beyond its {count} entries")
        for name, shape in shapes.items():
            require(name in rewind, f"the tensor rewind/{name} is missing")
            require(
                list(rewind[name].shape) == shape, f"rewind/{name} has shape {list(rewind[name].shape)}, not {shape}"
            )
        unsigned = {key: value for key, value in header.items() if key != "digest"}
        require(digest(unsigned, tensors) == header["digest"], "its content does not match its digest")
        weight_keep = {name: unpack(tensors[f"weight_keep/{name}"], math.prod(s)).view(s) for name, s in shapes.items()}
        try:
            return cls(unpack(tensors["edge_keep"], edges), weight_keep, rewind, metadata)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


def read_safetensors(path: Path) -> tuple[dict | None, dict[str, Tensor]]:
    """The JSON under HEADER (None where there is none) and the tensors of a safetensors file."""
    if not path.is_file():
        raise InputError(f"there is no ticket {path}; name a file such as tickets/round-03.safetensors in a run folder")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return (None if text is None else json.loads(text)), tensors
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OSError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is not a whole ticket: {reason}; write it again from its run folder") from None


def pack(keep: Tensor) -> Tensor:
    """bool [...] -> uint8 [ceil(n / 8)], element i in bit i % 8 of byte i // 8."""
    return torch.from_numpy(np.packbits(keep.detach().cpu().reshape(-1).numpy(), bitorder="little"))


def unpack(packed: Tensor, count: int) -> Tensor:
    """uint8 [ceil(count / 8)] -> bool [count]; the inverse of `pack`."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count, bitorder="little").astype(bool))


def canonical(value) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(header: dict, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the header without its digest and of each tensor's name, dtype, shape and bytes, by name."""
    state = hashlib.sha256(canonical(header).encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        state.update(canonical([name, str(value.dtype), list(value.shape)]).encode())
        state.update(value.reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def is_size(value) -> bool:
    return type(value) is int and value >= 0
