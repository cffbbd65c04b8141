"""Which edges and weights exist, and the soft masks laid over them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

AXES = ("edges", "weights")


@dataclass(frozen=True, eq=False)
class Elements:
    """One tensor over the edges and one for each masked weight, both seen as lists by axis: "edges" and "weights".

    ``edges`` [E] in the caller's order; ``weights`` by parameter name, in the parameter's shape.
    """

    edges: Tensor | None
    weights: dict[str, Tensor] = field(default_factory=dict)

    def axis(self, axis: str) -> list[Tensor]:
        """The tensors of one axis, as the selection ops take them."""
        if axis == "edges":
            return [] if self.edges is None else [self.edges]
        return list(self.weights.values())

    def with_axis(self, axis: str, tensors: list[Tensor]):
        """The same with the tensors of one axis replaced."""
        if axis == "edges":
            return type(self)(tensors[0], self.weights)
        return type(self)(self.edges, dict(zip(self.weights, tensors, strict=True)))

    def map(self, function: Callable[..., Tensor], *others: "Elements"):
        """``function`` of the tensors in the same place."""
        edges = None if self.edges is None else function(self.edges, *(other.edges for other in others))
        weights = {k: function(v, *(other.weights[k] for other in others)) for k, v in self.weights.items()}
        return type(self)(edges, weights)

    def flat(self, prefix: str) -> dict[str, Tensor]:
        """The tensors by name: prefix/edges and prefix/weights/<parameter>."""
        named = {f"{prefix}/weights/{name}": tensor for name, tensor in self.weights.items()}
        return named if self.edges is None else {f"{prefix}/edges": self.edges, **named}

    @classmethod
    def from_flat(cls, prefix: str, tensors: Mapping[str, Tensor]):
        """The inverse of ``flat``."""
        start = f"{prefix}/weights/"
        weights = {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}
        return cls(tensors.get(f"{prefix}/edges"), weights)


class Pattern(Elements):
    """Bool tensors: True where an element exists."""

    @classmethod
    def full(cls, num_edges: int, weights: Mapping[str, Tensor]) -> "Pattern":
        """Everything kept; ``weights`` gives names, shapes and device."""
        device = next((w.device for w in weights.values()), None)
        return cls(
            torch.ones(num_edges, dtype=torch.bool, device=device),
            {name: torch.ones(w.shape, dtype=torch.bool, device=w.device) for name, w in weights.items()},
        )

    def complement(self, axes=AXES) -> "Pattern":
        """Removed elements on ``axes``, everything on the others."""
        result = self
        for axis in AXES:
            result = result.with_axis(axis, [~t if axis in axes else torch.ones_like(t) for t in self.axis(axis)])
        return result

    def minus(self, other: "Pattern") -> "Pattern":
        """What is here and not in ``other``."""
        return self.map(lambda mine, theirs: mine & ~theirs, other)

    def kept(self, axis: str) -> int:
        return sum(int(t.sum()) for t in self.axis(axis))

    def total(self, axis: str) -> int:
        return sum(t.numel() for t in self.axis(axis))

    def counts(self) -> dict[str, int]:
        """edges_kept, edges_total, weights_kept, weights_total."""
        return {
            f"{axis}_{what}": getattr(self, what)(axis) for axis in AXES for what in ("kept", "total")
        }  # fmt: skip


class SoftMasks(Elements):
    """Float tensors that multiply; ``edges`` None or no weights where an axis carries no soft mask."""

    @classmethod
    def init(cls, pattern: Pattern, noise: float, make: Callable[[str], torch.Generator], axes=AXES) -> "SoftMasks":
        """1 + uniform(-noise, noise) on kept elements and 0 elsewhere, float32; ``make(name)`` gives each tensor's
        generator (UGS, Chen et al. 2021, code)."""

        def draw(name, keep):
            values = torch.rand(keep.shape, generator=make(name)).to(keep.device)
            return values.mul_(2 * noise).add_(1 - noise).mul_(keep)

        edges = draw("edges", pattern.edges) if "edges" in axes else None
        weights = {name: draw(name, keep) for name, keep in pattern.weights.items()} if "weights" in axes else {}
        return cls(edges, weights)
