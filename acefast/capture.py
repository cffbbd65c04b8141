"""What runs a function again on the device alone: a CUDA graph of it."""

from collections.abc import Callable

import torch


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
        """A function that does again, at each call, what ``run`` would do; ``run`` itself is not carried out."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph):
            run()
        return graph.replay


def capture_on(device: torch.device) -> CudaCapture | None:
    """What captures on ``device``; None where nothing can."""
    return CudaCapture(device) if device.type == "cuda" else None
