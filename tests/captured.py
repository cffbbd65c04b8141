"""A CUDA graph's stand-in on the CPU: what a function calls is recorded, and replayed on the same tensors. And the
trainings that are captured with it, or on a GPU."""

from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from acefast.data import synthetic_citation
from acefast.nn import build, state_of
from acefast.pruning import Pattern, SoftMasks
from acefast.train import Schedule, train

# Arguments that an op writes into though its schema does not say so.
WRITTEN = {torch.ops.aten.native_batch_norm.default: ("running_mean", "running_var")}


def tensors_of(values) -> list[torch.Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


def memory(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata


class Recording(TorchDispatchMode):
    """Every call of an op that reaches a kernel, those of autograd too: (op, arguments, keyword arguments, results).

    ``replay`` calls the ops again with the same arguments and writes what they give into the same results. Raises
    RuntimeError for what a CUDA graph cannot hold: an op that waits for a value or whose result's shape depends on one, and a
    tensor that is made of host values.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made = [], [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._refuse(func, args)
        given = {**dict(zip((argument.name for argument in func._schema.arguments), args)), **kwargs}
        for argument in func._schema.arguments:
            if (argument.alias_info is not None and argument.alias_info.is_write) or argument.name in WRITTEN.get(func, ()):
                self.before += [(t, t.clone()) for t in tensors_of(given.get(argument.name))]
        results = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, results))
        inputs = {memory(t) for t in tensors_of((args, kwargs))}
        self.made.update({memory(t): t for t in tensors_of(results) if memory(t) not in inputs})
        return results

    @staticmethod
    def _refuse(func, args) -> None:
        indexed = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)
        flags = indexed and any(t.dtype in (torch.bool, torch.uint8) for t in tensors_of(args[1]))
        shapes = torch.Tag.dynamic_output_shape in func.tags and func is not torch.ops.aten.index.Tensor
        if flags or shapes or torch.Tag.data_dependent_output in func.tags or func is torch.ops.aten.lift_fresh.default:
            raise RuntimeError(f"{func} cannot be captured")

    @torch.no_grad()
    def undo(self) -> None:
        """Leave everything as if nothing had been called, as after a capture: what was made holds nothing of use."""
        for t, value in reversed(self.before):
            t.detach().copy_(value)
        for t in self.made.values():
            if t.is_floating_point():
                t.detach().fill_(torch.nan)
        self.before, self.made = [], {}

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, results in self.calls:
            for kept, now in zip(tensors_of(results), tensors_of(func(*args, **kwargs)), strict=True):
                if memory(kept) != memory(now):
                    kept.detach().copy_(now)


class Watch(TorchFunctionMode):
    """Refuses what gives the host values past every op."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.numpy):
            raise RuntimeError(f"{func.__name__} cannot be captured")
        return func(*args, **(kwargs or {}))


class Recorder:
    """In place of ``acefast.capture.CudaCapture``. ``captured`` and ``replays`` count."""

    def __init__(self):
        self.captured = self.replays = 0

    def warm(self, run: Callable[[], None], times: int) -> None:
        for _ in range(times):
            run()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        with Recording() as recording, Watch():
            run()
        recording.undo()

        def replay():
            self.replays += 1
            recording.replay()

        return replay


DATA = synthetic_citation(
    400, 60, 3, seed=2, num_edges=800, words=6.0, train_per_class=6, num_val=40, num_test=50, name="small"
)
EPOCHS = 30
SCHEDULE = Schedule(EPOCHS, lr=0.02, weight_decay=5e-4, mask_lr=0.01, s1=1e-3, s2=1e-3)


NETWORKS = {
    "resgcn": dict(layers=3), "recomputed": dict(backbone="resgcn", layers=4, recompute=True), "narrow": dict(backbone="gat"),
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
