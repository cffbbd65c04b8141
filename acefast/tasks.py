"""What a model is trained for: the loss of a training step and what it is judged by, one class for each kind of task.

A task is made of a Dataset and the seed of a training:

    nodes                          {split: the nodes whose outputs the split is about, int64 [n], all different; None: all N}
    loss(outputs, split, epoch)    scalar, differentiable
    metric(outputs, split)         the data set's metric, a fraction, larger is better
    capturable                     whether an epoch of it may be captured in a CUDA graph or recorded: what it computes waits
                                   for no value and is the same in each epoch; it then has
    score(outputs, split)          the metric as a float64 [] on the device

outputs [n, C]: the model's at these nodes, in their order; split: train, val or test.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from acefast.data import Dataset
from acefast.data.dataset import SPLITS
from acefast.data.links import NonEdges
from acefast.data.metrics import accuracy_there, hits, rocauc
from acefast.nn.decoder import ScalarProduct
from acefast.random import generator, named_seed


class NodeClassification:
    """A class for each node: cross-entropy, accuracy."""

    capturable = True

    def __init__(self, data: Dataset, seed: int):
        self.nodes: dict[str, Tensor | None] = {split: getattr(data, split) for split in SPLITS}
        self.labels = {split: data.y[nodes] for split, nodes in self.nodes.items()}

    def loss(self, outputs: Tensor, split: str, epoch: int = 0) -> Tensor:
        return F.cross_entropy(outputs, self.labels[split])

    def score(self, outputs: Tensor, split: str) -> Tensor:
        return accuracy_there(outputs, self.labels[split])

    def metric(self, outputs: Tensor, split: str) -> float:
        return float(self.score(outputs, split))


class MultiLabel(NodeClassification):
    """Several yes-or-no labels for each node: binary cross-entropy, mean over those known; ROC-AUC, mean over labels."""

    capturable = False  # its metric looks at which labels count

    def __init__(self, data: Dataset, seed: int):
        super().__init__(data, seed)
        self.known = {split: (~labels.isnan()).float() for split, labels in self.labels.items()}

    def loss(self, outputs: Tensor, split: str, epoch: int = 0) -> Tensor:
        labels, known = self.labels[split].nan_to_num(), self.known[split]
        return F.binary_cross_entropy_with_logits(outputs, labels, known, reduction="sum") / known.sum()

    def metric(self, outputs: Tensor, split: str) -> float:
        return rocauc(outputs, self.labels[split])


class LinkPrediction:
    """Whether two nodes are joined: a pair is scored by `decoder` (``acefast.nn.decoder``) from its two nodes' outputs.

    Loss: binary cross-entropy over a split's links and its other pairs; in training as many as there are links, drawn anew for
    each epoch, uniformly among the pairs of different nodes that no edge of the graph joins, by a generator named after (seed,
    epoch). With `links` > 0 an epoch takes so many of the training links (at most all): each pass over them has an order of its
    own, drawn from (seed, pass), and leaves out at its end what is no whole epoch. Metric: the data set's, ROC-AUC or Hits@K.
    """

    capturable = False  # the host draws the pairs of an epoch

    def __init__(self, data: Dataset, seed: int, links: int = 0, decoder: torch.nn.Module | None = None):
        self.seed, self.name, self.links = seed, data.metric, data.train
        self.decoder = ScalarProduct() if decoder is None else decoder
        self.count = min(links, len(data.train)) or len(data.train)
        self.order: tuple[int, Tensor] | None = None  # of the pass that the last epoch was in
        self.others = NonEdges(data.graph.edge_index().T, data.num_nodes)
        self.nodes: dict[str, Tensor | None] = {"train": None}
        self.pairs = {} if self.count < len(data.train) else {"train": [self._prepared(data.train)]}
        for split in ("val", "test"):
            links, others = getattr(data, split), getattr(data, f"{split}_neg")
            self.nodes[split], ends = torch.unique(torch.cat((links, others)), return_inverse=True)
            count = self.nodes[split].numel()
            self.pairs[split] = [self.decoder.prepare(part, count) for part in ends.split((len(links), len(others)))]

    def scores(self, outputs: Tensor, split: str, epoch: int = 0) -> list[Tensor]:
        """[links], [other pairs]: their scores."""
        pairs = self.pairs.get(split) or [self._prepared(self._part(epoch))]
        if split == "train":
            drawn = self.others.draw(self.count, generator(self.seed, "negatives", epoch))
            pairs = [*pairs, self._prepared(drawn)]
        seeds = (named_seed(self.seed, "decoder", kind) for kind in ("links", "others"))
        return [self.decoder(part, outputs, seed, epoch) for part, seed in zip(pairs, seeds, strict=True)]

    def _prepared(self, pairs: Tensor):
        return self.decoder.prepare(pairs, self.others.n)

    def _part(self, epoch: int) -> Tensor:
        """The training links [count, 2] of an epoch."""
        turn, place = divmod(epoch, len(self.links) // self.count)
        if self.order is None or self.order[0] != turn:
            drawn = torch.randperm(len(self.links), generator=generator(self.seed, "links", turn))
            self.order = turn, drawn.to(self.links.device)
        return self.links[self.order[1][place * self.count : (place + 1) * self.count]]

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
KINDS = {"node": NodeClassification, "multilabel": MultiLabel}


def make_task(data: Dataset, seed: int = 0, links: int = 0, decoder: torch.nn.Module | None = None) -> Task:
    """The task of `data`; `seed` names what it draws. Where it is links: `links`, the training links of an epoch (0: all), and
    `decoder`, what scores pairs (None: scalar products)."""
    return LinkPrediction(data, seed, links, decoder) if data.task == "link" else KINDS[data.task](data, seed)
