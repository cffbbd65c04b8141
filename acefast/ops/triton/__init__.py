"""Triton kernels: one file per op, one function per op with the argument order of its schema.

They run on CUDA tensors, and on CPU tensors where TRITON_INTERPRET=1 was set before triton was imported.
"""

import contextlib

import torch


def on_device(tensor: torch.Tensor):
    """Context in which launches go to the tensor's CUDA device and its current stream; nothing for CPU tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
