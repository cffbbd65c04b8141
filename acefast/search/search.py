"""What every method's stages share: data, model, first weights, and the trainings a search is made of."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from acefast import ops
from acefast.data import Dataset
from acefast.nn import state_of
from acefast.pruning import AXES, Pattern, SoftMasks, find_score, score, standardise
from acefast.random import generator, named_seed
from acefast.search.config import SearchConfig
from acefast.search.state import State
from acefast.search.trainings import Trainings
from acefast.tasks import make_task
from acefast.train import Fit, Schedule, at, train


@dataclass(eq=False)
class Search:
    """A search in progress. ``start`` holds the first weights (rewind weights) and buffers by name (``nn.state_of``).

    A stage draws all its random numbers from generators named after the seed, the round and the stage, so a stage
    that was interrupted is simply run again; ``trainings`` keeps what it has trained so far.
    """

    config: SearchConfig
    data: Dataset
    model: torch.nn.Module
    callback: Callable[[dict], None]
    trainings: Trainings = field(default_factory=Trainings)
    start: dict[str, Tensor] = field(init=False)

    def __post_init__(self):
        self.start = {name: value.clone() for name, value in state_of(self.model).items()}

    def progress(self, event: dict) -> None:
        """Tell an event. Where the callback raises, as it may to stop the search, what was trained is written first."""
        try:
            self.callback(event)
        except BaseException:
            self.trainings.save()
            raise

    def rewind(self) -> None:
        """Set the model's weights and buffers to the first ones."""
        self._set(self.start)

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        for name, value in state_of(self.model).items():
            value.copy_(values[name])

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that are pruned."""
        return AXES if self.config.axes == "joint" else (self.config.axes,)

    def full(self) -> Pattern:
        """Every edge and every maskable weight."""
        return Pattern.full(self.data.graph.num_edges, {name: self.start[name] for name in self.model.maskable()})

    def macs(self, pattern: Pattern) -> int | None:
        """Multiply-accumulates of one inference of what the pattern keeps (``acefast.nn.Network.macs``); None where the model
        does not tell."""
        count = getattr(self.model, "macs", None)
        return None if count is None else count(self.data.graph, self.data.x, pattern.edges, pattern.weights)

    def seed(self, *names) -> int:
        """The seed of a consumer."""
        return named_seed(self.config.seed, *names)

    def make(self, *names) -> Callable[[str], torch.Generator]:
        """Generators of tensors by name, under ``names``."""
        return lambda tensor: generator(self.config.seed, *names, tensor)

    def retrain(self, state: State, stage: str, pattern: Pattern | None) -> Fit:
        """Train the first weights with frozen masks for ``fix_epochs``."""
        c = self.config
        schedule = Schedule(c.fix_epochs, c.fix_lr, c.weight_decay, links=c.links, evaluate_every=c.evaluate_every)
        return self._train(state, stage, stage, schedule, pattern, None)

    def train_masks(
        self, state: State, stage: str, model: str, pattern: Pattern, epochs: int, noise: str = "mask", until=None
    ) -> Fit:
        """Train the first weights and soft masks together; ``model`` names the network within the stage, ``noise`` the draw
        of the masks' first values; ``until`` ends it (see ``train``)."""
        c = self.config
        schedule = Schedule(
            epochs, c.lr, c.weight_decay, c.mask_lr, c.mask_weight_decay, c.s1, c.s2, c.links, c.evaluate_every
        )  # fmt: skip
        masks = SoftMasks.init(pattern, c.mask_noise, self.make(state.round, stage, model, noise), self.axes)
        return self._train(state, stage, model, schedule, pattern, masks, noise, until)

    def _train(self, state, stage, model, schedule, pattern, masks, noise="", until=None) -> Fit:
        place = {"round": state.round, "stage": stage, "model": model}
        key = {**place, "noise": noise, **asdict(schedule)}
        kept = until is None  # what until was told of the epochs is not kept, so such a training is begun anew

        def tell(epochs_done: int) -> None:
            self.progress({"event": "training", **place, "epochs": schedule.epochs, "done": epochs_done})

        fit = self.trainings.take(key, self.data.device) if kept else None
        if fit is not None:
            tell(schedule.epochs)
            self._set(fit.weights)
            return fit

        def on_start(training):
            if kept:
                self.trainings.begin(key, training)
            tell(training.epochs)

        def on_epochs(first, vals):
            before, self.trainings.epochs = self.trainings.epochs, self.trainings.epochs + len(vals)
            for epoch, val in enumerate(vals, first + 1):
                self.progress({"event": "epoch", **place, "epoch": epoch, "epochs": schedule.epochs, "val": val})
            self.trainings.pause(before)

        try:
            fit = train(
                self.model, self.data, schedule, self.start, pattern, masks,
                seed=self.seed(state.round, stage, model, "dropout"),
                keep_weights=True, on_epochs=on_epochs, until=until, on_start=on_start,
            )  # fmt: skip
        finally:
            self.trainings.end_training(key, fit if kept else None)
        return fit

    def scores(
        self, state: State, stage: str, model: str, fit: Fit, pattern: Pattern, axes: tuple[str, ...] | None = None
    ) -> SoftMasks:
        """Importance of the existing elements of ``axes`` (default: those that are pruned) at the fit's best epoch, by the
        configured score, together with what they carry from before."""
        needs = self._needs()
        gradients = self._mask_gradients(fit, pattern) if "gradients" in needs else None
        predictions = self._predictions(fit, pattern) if "predictions" in needs and "edges" in self.axes else None
        make = self.make(state.round, stage, model, "score")
        found = score(
            self.config.score, fit.masks, fit.weights, gradients, make, predictions, self._edge_score()
        )
        return self._carried(state, found, pattern, axes or self.axes) if self.config.carry else found

    def gains(self, fit: Fit, keep: Pattern) -> SoftMasks:
        """Importance of the removed elements to the fit's own model, at its best epoch: of weights |dL/dw| (RigL, Evci et al.,
        ICML 2020), of edges their score where predictions are all it needs, else -dL/dm, by how much the training loss would fall
        with them. Without dropout and L1 terms; what it says of kept elements is of no use."""
        self._set(fit.weights | {name: fit.weights[name] * m for name, m in fit.masks.weights.items()})
        self.model.eval()
        predicted = "edges" in self.axes and find_score(self._edge_score()).needs == ("predictions",)
        edges = None if fit.masks.edges is None or predicted else fit.masks.edges.clone().requires_grad_()
        ones = {name: k for name, k in keep.weights.items() if "weights" not in self.axes}
        outputs = self.model(
            self.data.graph, self.data.x, fit.masks.edges if edges is None else edges,
            keep.edges if edges is None else None, {}, ones,
        )  # fmt: skip
        parameters = dict(self.model.named_parameters())
        leaves = [parameters[name] for name in fit.masks.weights] + ([] if edges is None else [edges])
        gradients = list(torch.autograd.grad(self._loss(outputs, fit), leaves)) if leaves else []
        weights = {name: gradient.abs() for name, gradient in zip(fit.masks.weights, gradients)}
        if predicted:
            found = score(self._edge_score(), SoftMasks(fit.masks.edges, {}), predictions=self._predictions(fit, keep)).edges
        else:
            found = None if edges is None else -gradients[-1]
        return SoftMasks(found, weights)

    def _edge_score(self) -> str:
        return self.config.edge_score or self.config.score

    def _loss(self, outputs: Tensor, fit: Fit) -> Tensor:
        """The training loss of the fit's best epoch, with what its task drew for it."""
        task = make_task(self.data, fit.seed, self.config.links, getattr(self.model, "decoder", None))
        return task.loss(at(outputs, task.nodes["train"]), "train", fit.best_epoch)

    def _carried(self, state: State, scores: SoftMasks, pattern: Pattern, axes) -> SoftMasks:
        """c S + (1 - c) z of the existing elements, z their standardised scores and S the same of before (0 at first); the
        state remembers it."""
        share = self.config.carry
        memory = state.get("memory", SoftMasks) or scores.map(torch.zeros_like)
        for axis in axes:
            present = pattern.axis(axis)
            standard = standardise(scores.axis(axis), present, self.config.standardise)
            before = memory.axis(axis)
            after = [(share * s + (1 - share) * z).where(p, s) for s, z, p in zip(before, standard, present, strict=True)]
            memory = memory.with_axis(axis, after)
            scores = scores.with_axis(axis, after)
        state.put("memory", memory)
        return scores

    def _needs(self) -> set[str]:
        """What the configured scores need."""
        return {need for name in (self.config.score, self._edge_score()) for need in find_score(name).needs}

    def _at_best(self, fit: Fit, masks: SoftMasks, pattern: Pattern) -> Tensor:
        """The model's output for every node at the fit's best epoch, without dropout."""
        self._set(fit.weights)
        self.model.eval()
        return self.model(self.data.graph, self.data.x, masks.edges, pattern.edges, masks.weights, pattern.weights)

    @torch.no_grad()
    def _predictions(self, fit: Fit, pattern: Pattern) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(agreement, degrees) of every edge, existing or not; see ``acefast.pruning.scores.Inputs``."""
        graph = self.data.graph
        p = self._at_best(fit, fit.masks, pattern).softmax(1)
        into, out = (torch.zeros(graph.num_dst, dtype=torch.int64, device=graph.device) for _ in range(2))
        for edges, src, dst in graph.pieces():
            kept = pattern.edges[edges]
            into += torch.bincount(dst[kept], minlength=graph.num_dst)
            out += torch.bincount(src[kept], minlength=graph.num_dst)
        agreement = ops.sddmm(graph, p, p)
        from_out, into_in = torch.empty_like(agreement), torch.empty_like(agreement)
        for edges, src, dst in graph.pieces():
            from_out[edges], into_in[edges] = out[src].float(), into[dst].float()
        return agreement, (from_out, into_in)

    def _mask_gradients(self, fit: Fit, pattern: Pattern) -> SoftMasks:
        """dL/dm of the training loss of the fit's best epoch without dropout and L1 terms."""
        masks = fit.masks.map(lambda m: m.clone().requires_grad_())
        outputs = self._at_best(fit, masks, pattern)
        gradients = iter(torch.autograd.grad(self._loss(outputs, fit), [*masks.axis("edges"), *masks.axis("weights")]))
        return masks.map(lambda m: next(gradients))
