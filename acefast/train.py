"""One training loop for all: Adam over weights and soft masks, evaluation after each epoch, best epoch kept."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from acefast.capture import CudaCapture, Recording, capture_on
from acefast.csr import CSR
from acefast.data import Dataset
from acefast.errors import InputError
from acefast.kept import KeptWeights
from acefast.nn import Network, state_of
from acefast.optim import MaskedAdam
from acefast.pruning import Pattern, SoftMasks
from acefast.tasks import make_task

AHEAD, SECONDS = 25, 1.0  # epochs that run ahead of the host at most, and for how long
WARM_UP = 3  # epochs before the one that is captured


@dataclass(frozen=True)
class Schedule:
    """Epochs and optimiser settings of one training.

    Adam as torch.optim.Adam; weight decay is L2 inside Adam; s1 and s2 weigh the L1 terms |m_g| and |m_w|, whose
    subgradient s * sign(m) is added to the masks' gradients (UGS, Chen et al. 2021, code).
    """

    epochs: int
    lr: float
    weight_decay: float = 0.0
    mask_lr: float = 0.0
    mask_weight_decay: float = 0.0
    s1: float = 0.0
    s2: float = 0.0
    links: int = 0  # see acefast.tasks.make_task
    evaluate_every: int = 1  # epochs; the last one is evaluated too


@dataclass(eq=False)
class Fit:
    """What a training gives: the metric (a fraction) at the best epoch, the first evaluated one of highest validation metric.

    best_epoch counts from 0; val_loss is the task's loss on the validation split there; masks and weights are
    copies from after that epoch's step (weights, with the buffers of ``nn.state_of``, only where they were asked for; of
    existing elements only, the others are as in the masks' start and the first weights); seed: that of the training.
    """

    best_epoch: int
    val: float
    val_loss: float
    test: float
    masks: SoftMasks | None = None
    weights: dict[str, Tensor] | None = None
    seed: int = 0


def train(
    model: torch.nn.Module,
    data: Dataset,
    schedule: Schedule,
    start: dict[str, Tensor],
    pattern: Pattern | None = None,
    masks: SoftMasks | None = None,
    seed: int = 0,
    keep_weights: bool = False,
    on_epochs: Callable[[int, list[float | None]], None] | None = None,
    fast: bool = True,
    until: Callable[[SoftMasks], bool] | None = None,
    on_start: Callable[["Training"], None] | None = None,
) -> Fit:
    """Train ``model`` from the weights and buffers ``start`` (by name, ``nn.state_of``) on the existing elements of
    ``pattern`` (None: all of them).

    What is minimised and what it is judged by is the task of ``data`` (``acefast.tasks``). ``masks`` are trained along with the
    weights, in place; without them the pattern alone acts. ``seed`` names the dropout noise and what the task draws.
    After each epoch, or every ``evaluate_every`` of them, the model is evaluated on the validation split without dropout;
    ``on_epochs(first, vals)`` is called with the metrics of the epochs first, first + 1, ... done since its last call, one as
    a rule, None where it was not evaluated. The test split is evaluated once, at the best epoch. Afterwards the model holds
    that epoch's weights and buffers, or after an exception the weights of ``start``; meanwhile what it holds is train's own.
    ``on_start(training)`` is called before the first epoch: it may put the training to where an equal one stood
    (``Training.restore``), and from ``on_epochs`` it may be read where this one stands.

    ``fast`` computes what is needed and nothing else: removed weights have no gradient and no state (``MaskedAdam``),
    and a model with ``blocks`` (see ``acefast.nn.GCN``) is run on the part of the graph that the outputs asked for depend on.
    ``until(masks)``, called after each epoch with the soft masks, ends the training by True; the epoch at which it ended, the
    last one at the latest, then takes the place of the best one.
    A fast training whose task and model are ``capturable``, evaluated after each epoch and without ``until``, spares Python
    after the first epochs. On CUDA it captures one in a CUDA graph and replays it, ``AHEAD`` epochs or about ``SECONDS`` at a
    time, before the host looks at what came out; on the CPU it records the ops of one and calls them again
    (``acefast.capture.Recording``). The same Fit.
    Without ``fast`` the same numbers, up to rounding, come the straightforward way: masks as further parameters of
    torch.optim.Adam and every node computed. Raises InputError when the loss, a weight or a mask stops being finite.
    """
    task = make_task(data, seed, schedule.links, getattr(model, "decoder", None))
    try:
        way = (_Fast if fast else _Straightforward)(model, data, task, schedule, start, pattern, masks, seed)
        training = Training(way)
        if on_start is not None:
            on_start(training)
        capturable = task.capturable and getattr(model, "capturable", False) and schedule.evaluate_every == 1
        waits = until is not None or not (fast and capturable)
        capture = None if waits else capture_on(data.device)
        if capture is not None:
            epochs = _Ahead(model, task, training, schedule, capture, data.device)
        elif waits or data.device.type != "cpu":
            epochs = _OneByOne(model, task, training, schedule, until)
        else:
            epochs = _Replayed(model, task, training, schedule)
        while training.epochs < schedule.epochs and not training.ended:
            first, vals = training.epochs, epochs.run()
            if on_epochs is not None:
                on_epochs(first, vals)
        if not all(bool(torch.isfinite(t).all()) for t in (training.loss, *way.tracked)):
            raise InputError(f"training diverged within {schedule.epochs} epochs (a weight, mask or loss is not finite): lower lr")
        model.eval()
        best = training.best
        with torch.no_grad():
            if best.best_epoch >= 0:
                torch._foreach_copy_(way.tracked, training.snapshot)
            way.show_tracked()
            best.test = task.metric(way.outputs("test"), "test")
            best.masks, weights = way.finish()
        best.weights, best.seed = weights if keep_weights else None, seed
        return best
    except BaseException:  # what was interrupted leaves a model of its own shape, at its start
        for name, parameter in model.named_parameters():
            parameter.data = start[name].clone()
        raise


def lists_edges(edges: int, kept: int) -> bool:
    """Whether a pruned edge axis is held as lists of the kept edges. They are faster (about an eighth of a layer's time) but cost
    36 bytes a kept edge, where a graph of 10^7 edges or more takes flags until a third is left: 12 bytes an edge."""
    return edges < 10**7 or 3 * kept <= edges


class Training:
    """A training in progress. Between two epochs ``facts()`` and ``tensors()`` are all that it goes on from.

    epochs: those done; best: what the best of them gave, ``snapshot`` the tensors tracked after it; loss: the last one;
    ended: whether it is over before its time.
    """

    ended = False

    def __init__(self, way):
        self.way, self.epochs, self.best, self.loss = way, 0, Fit(-1, -1.0, 0.0, 0.0), torch.zeros(())
        self.snapshot = [torch.empty_like(t, requires_grad=False) for t in way.tracked]

    def keep_as_best(self, fit: Fit) -> None:
        self.best = fit
        torch._foreach_copy_(self.snapshot, self.way.tracked)

    def facts(self) -> dict:
        """Numbers, as JSON holds them."""
        best = {name: getattr(self.best, name) for name in ("best_epoch", "val", "val_loss")}
        return {"epochs": self.epochs, "loss": float(self.loss.detach()), **best}

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by name, the training's own, which its next epoch changes."""
        parts = {"tracked": self.way.tracked, "moments": self.way.moments()}
        if self.best.best_epoch >= 0:
            parts["best"] = self.snapshot
        return {f"{part}/{index}": t for part, tensors in parts.items() for index, t in enumerate(tensors)}

    @torch.no_grad()
    def restore(self, facts: dict, tensors: dict[str, Tensor]) -> None:
        """Go on, to the bit, from what an equal training gave between two epochs. Raises InputError, and changes nothing, where
        the tensors are none of this training."""
        before, self.best = self.best, Fit(facts["best_epoch"], facts["val"], facts["val_loss"], 0.0)
        mine = self.tensors()
        if _kinds(mine) != _kinds(tensors):
            self.best = before
            raise InputError("the tensors of another training")
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])
        self.epochs, self.loss = facts["epochs"], torch.tensor(facts["loss"])
        self.way.show_tracked()


class _OneByOne:
    """The epochs as the host sees them. ``run()`` does some, here one, and gives their metrics on the validation split."""

    def __init__(self, model, task, training, schedule, until=None):
        self.model, self.task, self.training, self.schedule, self.until = model, task, training, schedule, until

    def run(self) -> list[float | None]:
        training, epoch, val = self.training, self.training.epochs, None
        last = epoch == self.schedule.epochs - 1
        training.loss = self.step(epoch)
        training.ended = self.until is not None and (self.until(training.way.masks()) or last)
        if training.ended or last or (epoch + 1) % self.schedule.evaluate_every == 0:
            with torch.no_grad():
                val, val_loss = self.evaluate()
                if training.ended if self.until is not None else val > training.best.val:
                    training.keep_as_best(Fit(epoch, val, float(val_loss()), 0.0))
        training.epochs = epoch + 1
        return [val]

    def step(self, epoch: int | Tensor) -> Tensor:
        """The loss before a step and the step."""
        self.model.train()
        loss = self.task.loss(self.training.way.outputs("train", epoch), "train", epoch)
        self.training.way.step(loss)
        return loss

    def evaluate(self) -> tuple[float, Callable[[], Tensor]]:
        """The metric and what gives the loss, on the validation split."""
        self.model.eval()
        outputs = self.training.way.outputs("val")
        return self.task.metric(outputs, "val"), lambda: self.task.loss(outputs, "val")


class _Replayed(_OneByOne):
    """The same, where an epoch waits for no value: recorded after the first ones, then replayed (``Recording``)."""

    def __init__(self, model, task, training, schedule):
        super().__init__(model, task, training, schedule)
        self.number, self.recording, self.begin = torch.zeros(1, dtype=torch.int64), Recording(), training.epochs + WARM_UP
        self.replays: dict[str, Callable[[], list[Tensor]]] = {}

    def step(self, epoch: int) -> Tensor:
        self.number.fill_(epoch)
        return self._again("step", self.begin + 1, lambda: [super(_Replayed, self).step(self.number)])[0]

    def evaluate(self) -> tuple[float, Callable[[], Tensor]]:
        val, val_loss = self._again("evaluate", self.begin, self._evaluate)
        return float(val), lambda: val_loss

    def _evaluate(self) -> list[Tensor]:
        self.model.eval()
        outputs = self.training.way.outputs("val")
        return [self.task.score(outputs, "val"), self.task.loss(outputs, "val")]

    def _again(self, name: str, begin: int, run: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What ``run`` gives: by itself before the epoch ``begin``, which is recorded, and by replays after it. The evaluation is
        recorded first, since the step that follows goes back through what it made of the edge mask."""
        if self.training.epochs < begin or self.recording.refused:
            return run()
        if name in self.replays:
            return self.replays[name]()
        given, self.replays[name] = self.recording.record(run)
        return given


class _Ahead:
    """The same, some epochs at a time that the host does not wait for. What an epoch reads and leaves lies on the device: its
    number, the metrics of all epochs, and (epoch, val, val_loss) of the best one. The first epochs are run as they are, then
    one is captured and the rest are replays of it.
    """

    def __init__(self, model, task, training, schedule, capture: CudaCapture, device: torch.device):
        self.model, self.task, self.training, self.capture, self.total = model, task, training, capture, schedule.epochs
        best = training.best
        self.number = torch.tensor([training.epochs], device=device)
        self.vals = torch.zeros(schedule.epochs, dtype=torch.float64, device=device)
        self.best = torch.tensor([best.best_epoch, best.val, best.val_loss], dtype=torch.float64, device=device)
        training.loss = torch.empty((), device=device).copy_(training.loss)
        self.warm, self.replay, self.ahead = False, None, AHEAD

    def run(self) -> list[float]:
        training, first, began = self.training, self.training.epochs, time.perf_counter()
        count = min(self.ahead if self.warm else WARM_UP, self.total - first)
        if not self.warm:
            self.capture.warm(self._epoch, count)
            self.warm = True
        else:
            self.replay = self.replay or self.capture.capture(self._epoch)
            for _ in range(count):
                self.replay()
        training.epochs = first + count
        epoch, val, val_loss, *vals = torch.cat((self.best, self.vals[first : training.epochs])).tolist()
        training.best = Fit(int(epoch), val, val_loss, 0.0)
        self.ahead = max(1, min(AHEAD, int(SECONDS * count / (time.perf_counter() - began))))
        return vals

    def _epoch(self) -> None:
        task, training = self.task, self.training
        self.model.train()
        training.way.renew()  # a replay finds nothing that the epoch before it made
        loss = task.loss(training.way.outputs("train", self.number), "train")
        training.way.step(loss)
        self.model.eval()
        with torch.no_grad():
            training.loss.copy_(loss)
            outputs = training.way.outputs("val")
            val = task.score(outputs, "val")
            here = torch.stack((self.number[0].double(), val, task.loss(outputs, "val").double()))
            better = val > self.best[1]
            for kept, now in zip((self.best, *training.snapshot), (here, *training.way.tracked), strict=True):
                torch.where(better, now, kept, out=kept)
            self.vals.index_copy_(0, self.number, val.reshape(1))
            self.number.add_(1)


def _kinds(tensors: dict[str, Tensor]) -> dict:
    return {name: (t.shape, t.dtype) for name, t in tensors.items()}


def at(outputs: Tensor, nodes: Tensor | None) -> Tensor:
    """The rows of `outputs` [N, C] at the nodes int64 [n]; all for None."""
    return outputs if nodes is None else outputs.index_select(0, nodes)


def _all_kept(keep: Tensor) -> bool:
    return bool(keep.all())


def _columns_of_use(reading: set[str], keeps: dict[str, Tensor]) -> Tensor | None:
    """The columns, bool [F], of sparse features that the kept ones of the weights ``reading`` them need; None: all. Trained
    masks leave many that none needs."""
    if not reading or not reading <= keeps.keys():
        return None
    columns = torch.stack([keeps[name].any(0) for name in reading]).any(0)
    return None if bool(columns.all()) else columns


def _rewound_buffers(model: torch.nn.Module, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's buffers of ``nn.state_of``, set to those of ``start``."""
    parameters = dict(model.named_parameters())
    buffers = {name: value for name, value in state_of(model).items() if name not in parameters}
    for name, value in buffers.items():
        value.copy_(start[name])
    return buffers


class _Straightforward:
    """Masks are parameters beside the weights, torch's Adam updates all of them, every node is computed.

    ``tracked``: the tensors that training changes; ``moments()``, those of the optimiser besides. ``masks()``: the soft masks as
    they are. ``step(loss)`` takes one step; ``outputs(split, epoch)``, those at the nodes that the task needs of a split;
    ``renew()`` forgets what an earlier call of it made of masks that are still the same; ``show_tracked()`` lets the model
    follow after ``tracked`` was written; ``finish()`` gives (masks, weights) and leaves the weights in the model.
    """

    def __init__(self, model, data, task, schedule, start, pattern, masks, seed):
        self.model, self.nodes, self.seed, self.soft_masks = model, task.nodes, seed, masks
        self.parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(start[name])
            self.buffers = _rewound_buffers(model, start)
        edges = None if pattern is None or _all_kept(pattern.edges) else pattern.edges
        keeps = {} if pattern is None else {name: k for name, k in pattern.weights.items() if not _all_kept(k)}
        edge_mask = None if masks is None or masks.edges is None else masks.edges.requires_grad_()
        weight_masks = {} if masks is None else {name: m.requires_grad_() for name, m in masks.weights.items()}
        self.inputs = (data.graph, data.x, edge_mask, edges, weight_masks, keeps)
        mine = [] if edge_mask is None else [edge_mask]
        self.soft = [*mine, *weight_masks.values()]
        self.penalties = [schedule.s1] * len(mine) + [schedule.s2] * len(weight_masks)
        groups = [{"params": list(self.parameters.values()), "lr": schedule.lr, "weight_decay": schedule.weight_decay}]
        if self.soft:
            groups.append({"params": self.soft, "lr": schedule.mask_lr, "weight_decay": schedule.mask_weight_decay})
        self.optimizer = torch.optim.Adam(groups, lr=schedule.lr, fused=True)
        for leaf in (*self.soft, *self.parameters.values()):  # as Adam itself does at its first step
            moments = {name: torch.zeros_like(leaf, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[leaf] = {"step": torch.zeros((), device=leaf.device), **moments}
        self.tracked = [t.detach() for t in (*self.soft, *self.parameters.values(), *self.buffers.values())]

    def outputs(self, split: str, epoch: int = 0) -> Tensor:
        return at(self.model(*self.inputs, self.seed, epoch), self.nodes[split])

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            for mask, penalty in zip(self.soft, self.penalties, strict=True):
                if penalty:
                    mask.grad.add_(mask.sign(), alpha=penalty)
        self.optimizer.step()

    def moments(self) -> list[Tensor]:
        return [t for state in self.optimizer.state.values() for t in state.values()]

    def masks(self) -> SoftMasks | None:
        return None if self.soft_masks is None else self.soft_masks.map(torch.Tensor.detach)

    def show_tracked(self) -> None:
        pass  # the model reads the tracked tensors themselves

    def renew(self) -> None:
        pass  # nothing outlives a call

    def finish(self):
        return self.masks(), {name: t.detach().clone() for name, t in (self.parameters | self.buffers).items()}


class _Fast:
    """The parameters hold theta * mask and MaskedAdam holds the factors of the kept weights; the model runs on blocks where
    those are smaller than the graph. The same interface."""

    def __init__(self, model, data, task, schedule, start, pattern, masks, seed):
        self.model, self.data, self.nodes, self.seed, self.start = model, data, task.nodes, seed, start
        edges = None if pattern is None or _all_kept(pattern.edges) else pattern.edges
        listed = edges is not None and lists_edges(edges.numel(), int(edges.sum()))
        edges = data.graph.select(edges) if listed else edges
        self.edge_mask = None
        if masks is not None and masks.edges is not None:
            self.edge_mask = masks.edges.detach().requires_grad_()
        self.parameters = dict(model.named_parameters())
        soft = {} if masks is None else masks.weights
        keeps = {} if pattern is None else pattern.weights
        self.lists, self.trained = {}, {}  # weights held as lists of the kept ones; what is trained, by parameter name
        sparse, own = isinstance(data.x, CSR), isinstance(model, Network)
        shapes = {name: start[name].shape for name in self.parameters}
        self.reading = {n for n, shape in shapes.items() if sparse and len(shape) == 2 and shape[1] == data.num_features}
        self.x, self.columns = data.x, _columns_of_use(self.reading, keeps) if own else None
        if self.columns is not None:
            self.x = data.x.columns(self.columns)
            keeps, soft = ({name: self._narrow(name, t) for name, t in tensors.items()} for tensors in (keeps, soft))
        with torch.no_grad():
            self.buffers = _rewound_buffers(model, start)
            for name, p in self.parameters.items():
                p.data = self._narrow(name, start[name]).clone()
                self.trained[name] = p
                if name in self.reading:
                    if own and name in keeps and KeptWeights.pays(keeps[name], self.x):
                        kept = self.lists[name] = KeptWeights(keeps[name])
                        kept.values = self.trained[name] = torch.nn.Parameter(kept.listed(p))
                    else:  # it lies transposed, so that it is gathered row by row
                        p.data = p.data.t().contiguous().t()
        self.inputs = (self.edge_mask, edges, {}, self.lists)
        theta = dict(lr=schedule.lr, weight_decay=schedule.weight_decay)
        mask = dict(lr=schedule.mask_lr, weight_decay=schedule.mask_weight_decay)

        def group(listed, masked, kept, **settings):
            kind = (listed, masked, kept)
            names = [n for n in self.parameters if (n in self.lists, n in soft, n in keeps) == kind]
            masks = [self.lists[name].listed(soft[name]) if listed else soft[name] for name in names] if masked else None
            keep = [keeps[name] for name in names] if kept and not listed else None
            return {"params": [self.trained[name] for name in names], "masks": masks, "keep": keep, **settings}

        soft_settings = {"mask_lr": mask["lr"], "mask_weight_decay": mask["weight_decay"], "mask_l1": schedule.s2}
        groups = [group(*kind, **theta, **soft_settings) for kind in itertools.product((False, True), repeat=3)]
        if self.edge_mask is not None:
            groups.append({"params": [self.edge_mask], "keep": None if pattern is None else [pattern.edges], **mask,
                           "l1": schedule.s1, "compact": listed})  # fmt: skip
        self.optimizer = MaskedAdam([group for group in groups if group["params"]])
        self.leaves = [*self.trained.values(), *([] if self.edge_mask is None else [self.edge_mask])]
        self.tracked = [t for leaf in self.leaves for t in self.optimizer.factors(leaf)] + list(self.buffers.values())
        self.parts, self.of_edges = {}, {}

    def outputs(self, split: str, epoch: int | Tensor = 0) -> Tensor:
        if split not in self.parts:
            self.parts[split] = self._part(self.nodes[split])
        blocks, x, nodes = self.parts[split]
        own = self._edge_arguments(blocks) | ({} if blocks is None else {"blocks": blocks})
        return at(self.model(self.data.graph, x, *self.inputs, self.seed, epoch, **own), nodes)

    def _part(self, nodes: Tensor | None):
        """(blocks, x, rows of the model's outputs, each None for all) for the outputs at these nodes."""
        graph, x, blocks = self.data.graph, self.x, None
        if nodes is not None:
            neighbours = int(graph.in_degrees()[nodes].sum()) + nodes.numel()  # common ones once for each
            if hasattr(self.model, "blocks") and neighbours < 2 * graph.num_dst:
                blocks = self.model.blocks(graph, nodes, self.inputs[1])
        if blocks is None or blocks[-1].num_src > 0.9 * graph.num_dst:
            return None, x, nodes
        rows = blocks[0].src_nodes
        own = rows if x is None else x.take(rows) if isinstance(x, CSR) else x[rows]
        return blocks, own, None

    def _edge_arguments(self, blocks) -> dict:
        """What the model makes of the edges and their mask, of all of which blocks are parts: once for each state of the mask,
        so that an evaluation shares it with the step that follows, which then goes back through it."""
        if not hasattr(self.model, "edge_arguments"):
            return {}
        kind = blocks is None
        if kind not in self.of_edges:
            with torch.enable_grad():
                self.of_edges[kind] = self.model.edge_arguments(self.data.graph, *self.inputs[:2], blocks)
        return self.of_edges[kind]

    def renew(self) -> None:
        """Forget what was made of a mask."""
        if self.edge_mask is not None:
            self.of_edges.clear()

    def step(self, loss: Tensor) -> None:
        loss.backward()
        self.renew()
        self.optimizer.update()
        for leaf in self.leaves:
            leaf.grad = None

    def moments(self) -> list[Tensor]:
        return self.optimizer.moments()

    def show_tracked(self) -> None:
        self.renew()
        for leaf in self.leaves:
            theta, *mask = self.optimizer.factors(leaf)
            leaf.copy_(self.optimizer.expand(leaf, theta * mask[0] if mask else theta))

    def masks(self) -> SoftMasks | None:
        masks = {}
        for name in self.parameters:
            for m in self.optimizer.factors(self.trained[name])[1:]:
                masks[name] = self._whole(name, m, torch.zeros_like(self.start[name]))
        edges = None if self.edge_mask is None else self.edge_mask.detach()
        return SoftMasks(edges, masks) if edges is not None or masks else None

    def _narrow(self, name: str, t: Tensor) -> Tensor:
        """The columns of use of a tensor like a parameter; all but where that reads sparse features."""
        return t if self.columns is None or name not in self.reading else t[:, self.columns]

    def _whole(self, name: str, factor: Tensor, elsewhere: Tensor) -> Tensor:
        """A factor of the kept elements in the weight's shape, with the values of ``elsewhere`` where there are none."""
        rest = self._narrow(name, elsewhere)
        if name in self.lists:
            whole = self.lists[name].spread(factor, rest)
        else:
            whole = self.optimizer.expand(self.parameters[name], factor, rest)
        if rest is elsewhere:
            return whole
        return elsewhere.index_copy(1, self.columns.nonzero().squeeze(1), whole)

    def finish(self):
        masks, weights = self.masks(), {}
        for name, p in self.parameters.items():
            weights[name] = self._whole(name, self.optimizer.factors(self.trained[name])[0], self.start[name])
            p.data = weights[name].clone()
        return masks, weights | {name: value.clone() for name, value in self.buffers.items()}
