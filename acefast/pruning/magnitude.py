"""Magnitude pruning of any torch module, in place."""

from collections.abc import Callable, Iterable, Mapping
from functools import reduce

import torch
from torch import Tensor, nn

from acefast import ops
from acefast.errors import InputError
from acefast.pruning.schedule import prune_count
from acefast.pruning.ticket import FLOATS

SCOPES = ("global", "layer")
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 2**18  # elements at a time: what is converted to their integers stays in the cache


@torch.no_grad()
def global_magnitude_(
    module: nn.Module,
    sparsity: float,
    names: Iterable[str] | Callable[[str, Tensor], bool] | None = None,
    *,
    keep: Mapping[str, Tensor] | None = None,
    scope: str = "global",
    out: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Set the floor(sparsity * n) weights of least magnitude to 0, in place, and return which stay: {name: bool mask}.

    n counts the elements of all chosen parameters together, or of each parameter by itself with scope="layer". The
    count is exact, with `sparsity` the decimal it is written as (0.29 of 100 is 29); of equal magnitudes the first in
    order stay. One `ops.topk_mask` over the list of parameters: nothing is concatenated or sorted, and memory beyond
    the masks that are returned does not grow with the module (a parameter that is not contiguous, or not of the widest
    of several dtypes, is copied for the selection).

    Args:
        module: any module; its parameters may be float32, float64, float16 or bfloat16, also mixed (all are then
            compared in the dtype that holds them all), on one device, with any strides.
        sparsity: the fraction to remove, in [0, 1].
        names: the parameters to prune, as names of `module.named_parameters()` or as a function of name and parameter
            that says which. Default: those of `keep`, else every parameter named "weight" with 2 or more dimensions.
            One that is shared counts once, under the first of its names.
        keep: the masks of an earlier call. The fraction is then one of the elements still kept, and what is removed
            stays so, also where its weight has since become something else.
        scope: "global" or "layer".
        out: masks that receive the result, for instance `keep` itself; their content is lost where an error is raised.
    Raises InputError, with no weight changed, for an unknown name, no parameter, a sparsity out of range, NaN among the
    weights, unsuitable dtypes or devices, and masks that do not fit.

    Source: Han et al., NeurIPS 2015 (per layer); Frankle and Carbin, ICLR 2019 (global).
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, float | int) or not 0 <= sparsity <= 1:
        raise InputError(f"global_magnitude_: sparsity must be a number in [0, 1], got {sparsity!r}")
    if scope not in SCOPES:
        raise InputError(f"global_magnitude_: scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    chosen = _chosen(module, keep if names is None else names)
    for what, given in (("keep", keep), ("out", out)):
        if given is not None and given.keys() != chosen.keys():
            raise InputError(f"global_magnitude_: {what} must hold a mask for each of {', '.join(chosen)} and no other")
    groups = [list(chosen)] if scope == "global" else [[name] for name in chosen]
    masks: dict[str, Tensor] = {}
    for group in groups:
        alive, into = (None if given is None else [given[name] for name in group] for given in (keep, out))
        masks |= zip(group, _largest([chosen[name] for name in group], sparsity, alive, into), strict=True)
    for name, weight in chosen.items():
        _clear(weight, masks[name])
    return masks


def _largest(weights: list[Tensor], sparsity: float, alive, out) -> list[Tensor]:
    """Masks of what stays: all but the floor(sparsity * n) least of the n alive weights."""
    count = sum(w.numel() for w in weights) if alive is None else sum(int(part.sum()) for part in alive)
    wide = reduce(torch.promote_types, (w.dtype for w in weights))
    k = count - prune_count(count, sparsity)
    return ops.topk_mask([w.to(wide) for w in weights], k, alive, check=True, out=out)


def _clear(weight: Tensor, keep: Tensor) -> None:
    """weight = 0 where keep is False: the integers of the bits times keep, since infinity times 0 is NaN. In chunks
    this is five times as fast on the CPU as masked_fill_ or torch.where."""
    if not weight.numel():
        return
    bits, keep = torch.atleast_1d(weight.view(BITS[weight.element_size()]), keep)
    rows = max(1, CHUNK * len(bits) // weight.numel()) if weight.is_cpu else len(bits)
    for part, kept in zip(bits.split(rows), keep.split(rows), strict=True):
        part.mul_(kept)


def _chosen(module: nn.Module, names) -> dict[str, nn.Parameter]:
    """The parameters by name, a shared one once. Raises InputError for what `global_magnitude_` cannot take."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    if names is None:
        names = _is_weight
    if callable(names):
        names = [name for name, parameter in parameters.items() if names(name, parameter)]
    first: dict[int, str] = {}
    for name in names:
        if name not in parameters:
            raise InputError(f"global_magnitude_: the module has no parameter {name!r}, see module.named_parameters()")
        parameter = parameters[name]
        if parameter.dtype not in FLOATS:
            allowed = "float32, float64, float16 or bfloat16"
            raise InputError(f"global_magnitude_: {name} must be {allowed}, got {parameter.dtype}")
        first.setdefault(id(parameter), name)
    chosen = {name: parameters[name] for name in first.values()}
    if not chosen:
        raise InputError('global_magnitude_: no parameter to prune: name some (default: "weight" of 2 dimensions on)')
    devices = sorted({str(parameter.device) for parameter in chosen.values()})
    if len(devices) > 1:
        raise InputError(f"global_magnitude_: parameters must be on one device, got {' and '.join(devices)}")
    return chosen


def _is_weight(name: str, parameter: Tensor) -> bool:
    return name.rpartition(".")[2] == "weight" and parameter.dim() >= 2
