"""A CUDA graph's stand-in on the CPU: what a function calls is recorded, and replayed on the same tensors. And the
trainings that are captured with it, or on a GPU."""

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_leaves

from acefast.capture import Recording
from acefast.data import synthetic_citation
from acefast.nn import build, state_of
from acefast.pruning import Pattern, SoftMasks
from acefast.train import Schedule, train

# Arguments that an op writes into though its schema does not say so.
WRITTEN = {torch.ops.aten.native_batch_norm.default: ("running_mean", "running_var")}


def tensors_of(values) -> list[torch.Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


class Undone(Recording):
    """A recording that raises RuntimeError for what a CUDA graph cannot hold, and whose first run can be undone."""

    def __init__(self):
        super().__init__()
        self.before, self.made = [], []

    def refuse(self, what):
        raise RuntimeError(f"{what} cannot be captured")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {**dict(zip((argument.name for argument in func._schema.arguments), args)), **(kwargs or {})}
        for argument in func._schema.arguments:
            if (argument.alias_info is not None and argument.alias_info.is_write) or argument.name in WRITTEN.get(func, ()):
                self.before += [(t, t.clone()) for t in tensors_of(given.get(argument.name))]
        there = {t.untyped_storage()._cdata for t in tensors_of(given)}
        results = super().__torch_dispatch__(func, types, args, kwargs)
        self.made += [t for t in tensors_of(results) if t.untyped_storage()._cdata not in there]
        return results

    @torch.no_grad()
    def undo(self) -> None:
        """Leave everything as if nothing had been called, as after a capture: what was made holds nothing of use."""
        for t, value in reversed(self.before):
            t.detach().copy_(value)
        for t in self.made:
            if t.is_floating_point():
                t.detach().fill_(torch.nan)
        self.before, self.made = [], []


class Recorder:
    """In place of ``acefast.capture.CudaCapture``. ``captured`` and ``replays`` count."""

    def __init__(self):
        self.captured = self.replays = 0

    def warm(self, run: Callable[[], None], times: int) -> None:
        for _ in range(times):
            run()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        recording = Undone()
        _, again = recording.record(lambda: [run()][1:])
        recording.undo()

        def replay():
            self.replays += 1
            again()

        return replay


DATA = synthetic_citation(
    400, 60, 3, seed=2, num_edges=800, words=6.0, train_per_class=6, num_val=40, num_test=50, name="small"
)
EPOCHS = 30
SCHEDULE = Schedule(EPOCHS, lr=0.02, weight_decay=5e-4, mask_lr=0.01, s1=1e-3, s2=1e-3)


NETWORKS = {
    "resgcn": dict(layers=3), "recomputed": dict(backbone="resgcn", layers=4, recompute=True), "narrow": dict(backbone="gat"),
    "wide": dict(backbone="gcn", hidden=512),
}  # fmt: skip


def trained(network="gcn", share=0.5, frozen=False, model=None, data=DATA, schedule=SCHEDULE, **more):
    """(the Fit, the metrics of all epochs) of a fresh network; ``more``: arguments of ``train``."""
    settings = dict(backbone=network, in_channels=data.num_features, out_channels=data.num_classes, hidden=8, dropout=0.3, seed=2)
    model = model or build(**settings | NETWORKS.get(network, {}))
    if network == "narrow":
        model.dtype = torch.bfloat16
    model.to(data.device)
    start = {name: value.clone() for name, value in state_of(model).items()}
    full, draw = Pattern.full(data.graph.num_edges, model.maskable()), torch.Generator().manual_seed(3)
    pattern = full.map(lambda t: (torch.rand(t.shape, generator=draw) < share).to(data.device))
    masks = None if frozen else SoftMasks.init(pattern, 1e-5, lambda name: torch.Generator().manual_seed(1))
    vals = []
    more.setdefault("on_epochs", lambda first, some: vals.extend(some))
    return train(model, data, schedule, start, pattern, masks, 4, True, **more), vals


def stops_of(network="resgcn", **more):
    """(the Fit, {epochs done: (facts, tensors)} wherever the training may be read)."""
    at_work, stops = [], {}

    def keep(first, vals):
        training = at_work[0]
        assert training.epochs == first + len(vals)
        stops[training.epochs] = training.facts(), {name: t.clone() for name, t in training.tensors().items()}

    return trained(network, on_start=at_work.append, on_epochs=keep, **more)[0], stops


def assert_same(one, two):
    """Two fits agree to the bit."""
    for name in ("best_epoch", "val", "val_loss", "test", "seed"):
        assert getattr(one, name) == getattr(two, name), name
    assert one.weights.keys() == two.weights.keys() and all(torch.equal(w, two.weights[n]) for n, w in one.weights.items())
    assert (one.masks is None) == (two.masks is None)
    if one.masks is not None:
        assert torch.equal(one.masks.edges, two.masks.edges)
        assert all(torch.equal(m, two.masks.weights[name]) for name, m in one.masks.weights.items())
