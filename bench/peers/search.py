"""The trainings of a search written the usual way on PyG: dense features, dense masks, gather and scatter, torch.optim.Adam.

Every masked tensor has a trained and a fixed mask, multiplied in at each use, as the released codes of UGS and ACE-GLT have
them. Adam runs over all weights and trained masks, the L1 subgradient is added to the masks' gradients, all nodes are
evaluated after each epoch, and the best epoch's state is a deep copy. The same numbers as `acefast.train`, but for the
dropout noise, which is torch's.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import scatter

from acefast.data import Dataset
from acefast.pruning import Pattern, SoftMasks
from acefast.search import SearchConfig


class Masks(nn.Module):
    """The trained mask, 1 and not trained where `soft` is None, times the fixed one."""

    def __init__(self, soft: Tensor | None, keep: Tensor):
        super().__init__()
        self.train_mask = nn.Parameter(torch.ones(keep.shape, device=keep.device) if soft is None else soft.detach().clone())
        self.train_mask.requires_grad_(soft is not None)
        self.register_buffer("fixed_mask", keep.float())

    def forward(self) -> Tensor:
        return self.train_mask * self.fixed_mask


class MaskedGCNConv(MessagePassing):
    """y_i = sum over j of w_ij (x_j (W * m)^T), with an E x F tensor of messages."""

    def __init__(self, weight: Tensor, masks: Masks):
        super().__init__(aggr="add")
        self.weight, self.masks = nn.Parameter(weight.clone()), masks

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor) -> Tensor:
        return self.propagate(edge_index, x=F.linear(x, self.weight * self.masks()), edge_weight=edge_weight)

    def message(self, x_j: Tensor, edge_weight: Tensor) -> Tensor:
        return edge_weight.unsqueeze(1) * x_j


class MaskedGCN(nn.Module):
    """GCN of preset `paper`: added self-loops without a mask, normalised by masked degrees, ReLU and dropout between layers."""

    def __init__(self, start: dict[str, Tensor], pattern: Pattern, soft: SoftMasks, dropout: float):
        super().__init__()
        self.edge_masks = Masks(soft.edges, pattern.edges)
        self.convs = nn.ModuleList(
            MaskedGCNConv(start[name], Masks(soft.weights.get(name), keep)) for name, keep in pattern.weights.items()
        )
        self.dropout = dropout

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:  # edge_index with the loops at its end; logits [N, classes]
        edge_weight = torch.cat([self.edge_masks(), x.new_ones(x.size(0))])
        src, dst = edge_index
        degree = scatter(edge_weight, dst, dim_size=x.size(0))
        scale = torch.where(degree > 0, degree, torch.inf).rsqrt()
        edge_weight = scale[src] * edge_weight * scale[dst]
        for number, conv in enumerate(self.convs):
            if number:
                x = F.dropout(x.relu(), self.dropout, self.training)
            x = conv(x, edge_index, edge_weight)
        return x


class Training:
    """One training of a search, epoch by epoch: from the weights `start` on the elements of `pattern`, with the soft masks
    `soft` trained along, or frozen masks where it is None.

    `data` has a graph without self-loops; of `config` the settings of optimiser, L1 terms and dropout are used. `best` holds
    the first epoch of highest validation accuracy: best_epoch, val, val_loss, test, and the model's `state` there.
    """

    def __init__(self, data: Dataset, start: dict[str, Tensor], config: SearchConfig, pattern: Pattern, soft: SoftMasks | None):
        loops = torch.arange(data.num_nodes, device=data.device).expand(2, -1)
        self.data, self.x = data, data.x if isinstance(data.x, Tensor) else data.x.to_dense()
        self.edge_index = torch.cat([data.graph.edge_index(), loops], 1)
        self.model = MaskedGCN(start, pattern, soft or SoftMasks(None), config.dropout)
        masks = [module for module in self.model.modules() if isinstance(module, Masks)]
        penalties = [config.s1, *[config.s2] * len(pattern.weights)]
        self.penalised = [(m.train_mask, s) for m, s in zip(masks, penalties, strict=True) if m.train_mask.requires_grad]
        self.optimizer = torch.optim.Adam(
            [
                {"params": [conv.weight for conv in self.model.convs], "weight_decay": config.weight_decay},
                {"params": [m for m, _ in self.penalised], "lr": config.mask_lr, "weight_decay": config.mask_weight_decay},
            ],
            lr=config.lr,
        )
        self.epochs, self.best = 0, {"val": -1.0}

    def epoch(self) -> float:
        """Step, evaluation, best epoch; returns the validation accuracy."""
        data, labels = self.data, self.data.y
        self.model.train()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.x, self.edge_index)[data.train], labels[data.train])
        loss.backward()
        with torch.no_grad():
            for mask, s in self.penalised:
                mask.grad.add_(s * mask.sign())
        self.optimizer.step()

        self.model.eval()
        with torch.no_grad():
            logits = self.model(self.x, self.edge_index)
        right = logits.argmax(1) == labels
        val, test = (int(right[nodes].sum()) / nodes.numel() for nodes in (data.val, data.test))
        if val > self.best["val"]:
            val_loss = float(F.cross_entropy(logits[data.val], labels[data.val]))
            state = copy.deepcopy(self.model.state_dict())
            self.best = {"best_epoch": self.epochs, "val": val, "val_loss": val_loss, "test": test, "state": state}
        self.epochs += 1
        return val
