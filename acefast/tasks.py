"""What a model is trained for: the loss of a training step and what it is judged by, one class for each kind of task.

A task is made of a Dataset and the seed of a training:

    nodes                          {split: the nodes whose outputs the split is about, int64 [n], all different; None: all N}
    loss(outputs, split, epoch)    scalar, differentiable
    metric(outputs, split)         the data set's metric, a fraction, larger is better

outputs [n, C]: the model's at these nodes, in their order; split: train, val or test.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from acefast import ops
from acefast.data import Dataset
from acefast.data.dataset import SPLITS
from acefast.data.links import NonEdges
from acefast.data.metrics import accuracy, hits, rocauc
from acefast.graph import Graph
from acefast.random import generator


class NodeClassification:
    """A class for each node: cross-entropy, accuracy."""

    def __init__(self, data: Dataset, seed: int):
        self.nodes: dict[str, Tensor | None] = {split: getattr(data, split) for split in SPLITS}
        self.labels = {split: data.y[nodes] for split, nodes in self.nodes.items()}

    def loss(self, outputs: Tensor, split: str, epoch: int = 0) -> Tensor:
        return F.cross_entropy(outputs, self.labels[split])

    def metric(self, outputs: Tensor, split: str) -> float:
        return accuracy(outputs, self.labels[split])


class MultiLabel(NodeClassification):
    """Several yes-or-no labels for each node: binary cross-entropy, mean over those known; ROC-AUC, mean over labels."""

    def __init__(self, data: Dataset, seed: int):
        super().__init__(data, seed)
        self.known = {split: (~labels.isnan()).float() for split, labels in self.labels.items()}

    def loss(self, outputs: Tensor, split: str, epoch: int = 0) -> Tensor:
        labels, known = self.labels[split].nan_to_num(), self.known[split]
        return F.binary_cross_entropy_with_logits(outputs, labels, known, reduction="sum") / known.sum()

    def metric(self, outputs: Tensor, split: str) -> float:
        return rocauc(outputs, self.labels[split])


class LinkPrediction:
    """Whether two nodes are joined: the score of a pair is the scalar product of their outputs z, s_ij = <z_i, z_j>.

    Loss: binary cross-entropy over a split's links and its other pairs; in training as many as there are links, drawn anew for
    each epoch, uniformly among the pairs of different nodes that no edge of the graph joins, by a generator named after (seed,
    epoch). Metric: the data set's, ROC-AUC or Hits@K. Scores are an ``sddmm`` over the pairs, so no [pairs, C] is made.
    """

    def __init__(self, data: Dataset, seed: int):
        self.seed, self.name = seed, data.metric
        self.others = NonEdges(data.graph.edge_index().T, data.num_nodes)
        self.nodes: dict[str, Tensor | None] = {"train": None}
        self.pairs = {"train": [Graph.from_edge_index(data.train.T, num_nodes=data.num_nodes)]}
        for split in ("val", "test"):
            links, others = getattr(data, split), getattr(data, f"{split}_neg")
            self.nodes[split], ends = torch.unique(torch.cat((links, others)), return_inverse=True)
            parts = ends.T.split((len(links), len(others)), 1)
            self.pairs[split] = [Graph.from_edge_index(part, num_nodes=self.nodes[split].numel()) for part in parts]

    def scores(self, outputs: Tensor, split: str, epoch: int = 0) -> list[Tensor]:
        """[links], [other pairs]: their scores."""
        pairs = self.pairs[split]
        if split == "train":
            drawn = self.others.draw(pairs[0].num_edges, generator(self.seed, "negatives", epoch))
            pairs = [*pairs, Graph.from_edge_index(drawn.T, num_nodes=self.others.n)]
        return [ops.sddmm(part, outputs, outputs) for part in pairs]

    def loss(self, outputs: Tensor, split: str, epoch: int = 0) -> Tensor:
        return F.binary_cross_entropy_with_logits(*_joined(*self.scores(outputs, split, epoch)))

    def metric(self, outputs: Tensor, split: str) -> float:
        links, others = self.scores(outputs, split)
        if self.name == "rocauc":
            return rocauc(*(part.unsqueeze(1) for part in _joined(links, others)))
        return hits(links, others, int(self.name.removeprefix("hits@")))


def _joined(links: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of both and the labels that go with them, 1 and 0."""
    return torch.cat((links, others)), torch.cat((torch.ones_like(links), torch.zeros_like(others)))


Task = NodeClassification | LinkPrediction
KINDS = {"node": NodeClassification, "multilabel": MultiLabel, "link": LinkPrediction}


def make_task(data: Dataset, seed: int = 0) -> Task:
    """The task of `data`; `seed` names what it draws."""
    return KINDS[data.task](data, seed)
