"""What the networks of a search have in common."""

import torch
from torch import Tensor, nn

from acefast.csr import CSR
from acefast.errors import InputError
from acefast.graph import Graph
from acefast.nn.edges import part_of
from acefast.nn.linear import region_dtype
from acefast.random import generator


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and those buffers of its state_dict that are floating-point, such as the running statistics of a
    batch norm, by name and sharing memory: what a training starts from, changes and goes back to."""
    saved = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name in saved and b.is_floating_point()}
    return {name: p.detach() for name, p in model.named_parameters()} | buffers


class Network(nn.Module):
    """Masked layers in ``layers``, each with ``maskable()``, ``reset_parameters(generator)`` and ``macs``; for links that are not
    scored by scalar products also a ``decoder`` (``acefast.nn.decoder``), trained with them and never masked, else None.

    A search needs of a network: named parameters, ``maskable()``, the forward of :class:`acefast.nn.GCN`, and optionally
    ``blocks`` and ``macs``; what `state_of` gives is rewound and kept together. ``capturable`` says that its forward takes the
    step as an int64 tensor [1] on the device too, waits for no value of a tensor and does the same at each call, so that a CUDA
    graph, or on the CPU the list of the ops that it called, may stand for it.

    ``dtype`` is that of hidden features, float32 unless set; with bfloat16 a call is an autocast region: features, what layers
    give and what is kept for backward are bfloat16, and so are weights within a product, whose sums are float32. Parameters,
    masks, coefficients of edges, softmax denominators, running statistics, gradients of all these, and the logits are float32,
    and so is all that ``decoder`` computes of them.
    """

    layers: nn.ModuleList
    capturable = True

    def __init__(self):
        super().__init__()
        self.dtype = torch.float32
        self.register_parameter("embedding", None)
        self.register_module("decoder", None)

    def __call__(self, graph: Graph, *args, **kwargs) -> Tensor:
        """The forward, in ``dtype`` but for what it returns."""
        if self.dtype == torch.float32:
            return super().__call__(graph, *args, **kwargs)
        with torch.autocast(graph.device.type, self.dtype, cache_enabled=False):  # a weight is read once a call
            return super().__call__(graph, *args, **kwargs).float()

    def embed(self, num_nodes: int, channels: int, seed: int) -> "Network":
        """Give the network features of its own, a parameter ``embedding`` [num_nodes, channels] that is trained with it: where
        x is None they take its place, where x is int64 [n] those of the nodes that it names. First uniform in
        +-sqrt(6 / (num_nodes + channels)) (Glorot and Bengio, AISTATS 2010). It is never masked."""
        bound = (6 / (num_nodes + channels)) ** 0.5
        self.embedding = nn.Parameter(torch.empty(num_nodes, channels))
        with torch.no_grad():
            self.embedding.uniform_(-bound, bound, generator=generator(seed, "init", "embedding"))
        return self

    def given(self, x: CSR | Tensor | None) -> CSR | Tensor:
        """The features that the first layer reads: x, or those of ``embed``; dense ones in the dtype of an autocast region.
        Raises InputError where there are neither."""
        if isinstance(x, CSR):
            return x
        if x is None or not x.is_floating_point():
            if self.embedding is None:
                raise InputError("x is no features and the network has none of its own: give x [N, F], or call embed first")
            x = self.embedding if x is None else self.embedding[x]
        dtype = region_dtype(x.device)
        return x if dtype is None else x.to(dtype)

    def reset_parameters(self, seed: int) -> None:
        """Fresh weights from generators named after the layers."""
        for index, layer in enumerate(self.layers):
            layer.reset_parameters(generator(seed, "init", index))

    def macs(self, graph: Graph, x: CSR | Tensor | None, edge_keep: Tensor | None = None, weight_keep=None) -> int:
        """Exact number of multiply-accumulates of one inference on the whole graph with these edges and weights alone.

        Counted are products with weights (of a sparse x, for each of its entries those with kept weights; hidden features
        count as dense) and, for each existing edge and self-loop, one for each channel that it passes on. Not counted:
        normalisation, softmax, biases, activations. x [N, F]; edge_keep bool [E]; weight_keep {name: bool} as of the forward.
        """
        shapes = [x if isinstance(x, CSR) else graph.num_dst, *[graph.num_dst] * (len(self.layers) - 1)]
        return sum(
            layer.macs(graph, shape, edge_keep, part_of(weight_keep, f"layers.{index}."))
            for index, (layer, shape) in enumerate(zip(self.layers, shapes, strict=True))
        )

    def compact(self, graph: Graph, edge_keep: Tensor) -> tuple[Graph, dict]:
        """(graph, further arguments of the forward) with which the network gives the logits of the kept edges [E] alone, made
        once for many inferences: here the smaller graph, where removed edges do not exist."""
        return graph.compact(edge_keep), {}

    def parts(self, width: int) -> "list[tuple[Network, dict[str, tuple[slice, slice]]]]":
        """Networks whose logits add up to this one's, each of at most `width` hidden channels, and of which rows and columns of
        this one's weights theirs are, by name; the network itself where it is no such sum."""
        return [(self, {})]

    def maskable(self) -> dict[str, nn.Parameter]:
        """The weights that a search may prune, by parameter name."""
        return {f"layers.{i}.{name}": w for i, layer in enumerate(self.layers) for name, w in layer.maskable().items()}
