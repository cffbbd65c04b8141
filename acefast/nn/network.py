"""What the networks of a search have in common."""

from torch import nn

from acefast.random import generator


class Network(nn.Module):
    """Masked layers in ``layers``, each with ``maskable()`` and ``reset_parameters(generator)``.

    A search needs of a network: named parameters, ``maskable()``, the forward of :class:`acefast.nn.GCN`, and optionally
    ``blocks``.
    """

    layers: nn.ModuleList

    def reset_parameters(self, seed: int) -> None:
        """Fresh weights from generators named after the layers."""
        for index, layer in enumerate(self.layers):
            layer.reset_parameters(generator(seed, "init", index))

    def maskable(self) -> dict[str, nn.Parameter]:
        """The weights that a search may prune, by parameter name."""
        return {f"layers.{i}.{name}": w for i, layer in enumerate(self.layers) for name, w in layer.maskable().items()}
