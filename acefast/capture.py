"""What runs a function again without the Python that it is written in: a CUDA graph of it or, on the CPU, the ops it called."""

import gc
from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from acefast.ops import backend


class CudaCapture:
    """Captures functions on ``device`` into CUDA graphs, each with a memory pool of its own.

    A function that is captured reads and writes tensors that stay where they are, starts the same kernels at each call, and
    waits for nothing: no value of its tensors reaches the host.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def warm(self, run: Callable[[], None], times: int) -> None:
        """Call ``run`` on a stream of its own, as must have been done before a capture: kernels are loaded, what is made at a
        first call is there, and autograd holds nothing of another stream."""
        here, aside = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(times):
                run()
        here.wait_stream(aside)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """A function that does again, at each call, what ``run`` would do; ``run`` itself is not carried out.

        What torch.cuda.graph does besides, a collection of garbage and giving back all cached memory, costs more than a small
        epoch's capture: memory is given back where much of the GPU's is held, and no garbage is collected meanwhile.
        """
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            if torch.cuda.memory_reserved() > torch.cuda.get_device_properties(self.device).total_memory / 4:
                torch.cuda.empty_cache()
            gc.disable()
            try:
                with torch.cuda.stream(torch.cuda.Stream(self.device)):
                    graph.capture_begin()
                    try:
                        run()
                    finally:
                        graph.capture_end()
            finally:
                if collects:
                    gc.enable()
        return graph.replay


def capture_on(device: torch.device) -> CudaCapture | None:
    """What captures on ``device``; None where nothing can."""
    return CudaCapture(device) if device.type == "cuda" else None


class Recording(TorchDispatchMode):
    """Functions on the CPU whose ops are called again in their place: no module, no autograd, no checks.

    ``record(run)`` carries out ``run`` and keeps every op that reached a kernel, those of autograd too. A tensor that ``run`` found
    is read and written where it lies; one that an op made is made anew by each replay and forgotten after its last use.
    Functions that hand on tensors to each other are recorded in the order in which they are replayed, in turn.
    ``refused``: the first op that gave the host a value or a shape that depends on values, or that took a value of the host's;
    None: there was none. What the host makes of such values a replay would not do, so that there is none then.
    """

    def __init__(self):
        super().__init__()
        self.refused: str | None = None
        self._calls: list[tuple] = []  # (function, args, kwargs, where in them a place's tensor belongs, what it makes)
        self._made: list[Tensor | None] = []  # what the calls make, by place
        self._places: dict[int, dict[tuple, int]] = {}  # memory -> layout -> place
        self._last: list[int | None] = []  # by place, the call that uses it last; None: what a function gives
        self._forgotten: list[list[int]] | None = None  # by call, the places that it uses last; None: to be listed

    def record(self, run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], list[Tensor]] | None]:
        """(what ``run`` gives, the function that does it again and gives the same tensors; None where something was refused)."""
        first, self._forgotten = len(self._calls), None
        with self, _Watch(self):
            given = run()
        results = [] if self.refused else [self._place(t) for t in given]
        if None in results:
            self.refuse("giving what no op made")
        if self.refused:
            return given, None
        for place in results:
            self._last[place] = None
        last = len(self._calls)
        return given, lambda: self._replay(first, last, results)

    def _replay(self, first: int, last: int, results: list[int]) -> list[Tensor]:
        if self._forgotten is None:
            self._forgotten = [[] for _ in self._calls]
            for place, call in enumerate(self._last):
                if call is not None:
                    self._forgotten[call].append(place)
        made = self._made
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for call in range(first, last):
                function, args, kwargs, taken, makes = self._calls[call]
                for values, key, place in taken:
                    values[key] = made[place]
                outputs = function(*args, **kwargs)
                for values, key, _ in taken:
                    values[key] = None
                for place, index in makes:
                    made[place] = outputs if index is None else outputs[index]
                outputs = None
                for place in self._forgotten[call]:
                    made[place] = None
        return [made[place] for place in results]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._look_at(func, args)
        outputs, returns = func(*args, **kwargs), func._schema.returns
        if self.refused:
            return outputs
        if returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            return outputs  # views, which are made of the memory they show where they are used
        function = func
        if func.namespace == "acefast":
            function = backend.implementation(func._opname, "cpu", backend.get_backend())
        self._call(function, list(args), dict(kwargs), outputs)
        return outputs

    def refuse(self, what: str) -> None:
        self.refused = self.refused or what

    def _look_at(self, func, args) -> None:
        """Refuse an op that passes values between tensors and the host, or whose result's shape depends on them."""
        indexed = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)
        flags = indexed and any(isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        shapes = torch.Tag.dynamic_output_shape in func.tags and func is not torch.ops.aten.index.Tensor
        if flags or shapes or torch.Tag.data_dependent_output in func.tags or func is torch.ops.aten.lift_fresh.default:
            self.refuse(str(func))

    def _call(self, function, args: list, kwargs: dict, outputs) -> None:
        """Keep a call; the tensors that it makes get places."""
        there = {_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        taken: list[tuple] = []
        args, kwargs = self._emptied(args, taken), self._emptied(kwargs, taken)
        call, makes = len(self._calls), []
        for *_, place in taken:
            self._last[place] = call
        single = isinstance(outputs, Tensor)
        if isinstance(outputs, (list, tuple)) and any(isinstance(output, (list, tuple)) for output in outputs):
            function = _flat(function)
        for index, output in enumerate(tree_leaves(outputs)):
            if isinstance(output, Tensor) and _memory(output) not in there:
                makes.append((len(self._made), None if single else index))
                self._places[_memory(output)] = {_layout(output): len(self._made)}
                self._made.append(None)
                self._last.append(call)
        self._calls.append((function, args, kwargs, taken, makes))

    def _emptied(self, values, taken):
        """The list or dict ``values`` without the tensors that have a place; where those belong is noted in ``taken``."""
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            if isinstance(value, (list, tuple)):
                values[key] = self._emptied(list(value), taken)
            elif isinstance(value, Tensor):
                place = self._place(value)
                if place is None:
                    values[key] = value.detach()
                else:
                    values[key] = None
                    taken.append((values, key, place))
        return values

    def _place(self, t: Tensor) -> int | None:
        """The place of a tensor that the calls make, or of a view of one; None for one that was there."""
        places = self._places.get(_memory(t))
        if places is None:
            return None
        layout = _layout(t)
        if layout not in places:
            call, args = len(self._calls), [None, *layout]
            whole = next(iter(places.values()))
            places[layout] = len(self._made)
            self._calls.append((_view, args, {}, [(args, 0, whole)], [(places[layout], None)]))
            self._last[whole] = call
            self._made.append(None)
            self._last.append(call)
        return places[layout]


class _Watch(TorchFunctionMode):
    """Sees what gives the host values past every op."""

    def __init__(self, recording: Recording):
        super().__init__()
        self.recording = recording

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.tolist, Tensor.numpy):
            self.recording.refuse(func.__name__)
        return func(*args, **(kwargs or {}))


def _memory(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _layout(t: Tensor) -> tuple:
    return t.dtype, t.storage_offset(), t.size(), t.stride()


def _view(t: Tensor, dtype: torch.dtype, offset: int, size: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """The tensor of this layout in the memory of ``t``."""
    if dtype == t.dtype:
        return t.as_strided(size, stride, offset)
    return t.new_empty(0, dtype=dtype).set_(t.untyped_storage(), offset, size, stride)


def _flat(function: Callable) -> Callable:
    return lambda *args, **kwargs: tree_leaves(function(*args, **kwargs))
