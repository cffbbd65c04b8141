"""What a search knows after a stage: all of it, so that a run goes on from here and nowhere else."""

import json
from dataclasses import dataclass, field

import torch
from torch import Tensor

from acefast.pruning import Elements, Pattern
from acefast.pruning.ticket import pack, unpack


@dataclass
class State:
    """Progress (``round``, and ``stage``: how many of its stages are done), tensors and JSON values by name, and the
    lines of history and timings so far."""

    round: int = 0
    stage: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    timings: list[dict] = field(default_factory=list)

    def copy(self) -> "State":
        """A copy that shares tensors, which no stage changes in place."""
        values = json.loads(json.dumps(self.values))
        return State(self.round, self.stage, dict(self.tensors), values, list(self.history), list(self.timings))

    def put(self, name: str, elements: Elements) -> None:
        """Store elements under a name."""
        self.drop(name)
        self.tensors.update(elements.flat(name))

    def get(self, name: str, kind=Pattern):
        """The elements stored under a name, None where there are none."""
        found = kind.from_flat(name, self.tensors)
        return found if found.edges is not None or found.weights else None

    def drop(self, *names: str) -> None:
        """Forget the elements under these names."""
        prefixes = tuple(f"{name}/" for name in names)
        self.tensors = {key: value for key, value in self.tensors.items() if not key.startswith(prefixes)}

    def to_flat(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, JSON object); bool tensors become packed bits."""
        packed, shapes = {}, {}
        for name, tensor in self.tensors.items():
            if tensor.dtype == torch.bool:
                shapes[name] = list(tensor.shape)
                tensor = pack(tensor)
            packed[name] = tensor.detach().cpu().contiguous()
        record = {key: getattr(self, key) for key in ("round", "stage", "values", "history", "timings")}
        return packed, {**record, "bits": shapes, "order": list(packed)}

    @classmethod
    def from_flat(cls, tensors: dict[str, Tensor], record: dict, device="cpu") -> "State":
        """The inverse of ``to_flat``, in the same order, which selections over lists of tensors depend on."""
        shapes = record["bits"]
        restored = {}
        for name in record["order"]:
            tensor = tensors[name]
            if name in shapes:
                tensor = unpack(tensor, torch.Size(shapes[name]).numel()).view(shapes[name])
            restored[name] = tensor.to(device)
        return cls(tensors=restored, **{key: record[key] for key in ("round", "stage", "values", "history", "timings")})
