"""MaskedAdam: Adam on weights and soft masks together, for any module, on ``ops.masked_adam``."""

from collections.abc import Iterable
from dataclasses import fields

import torch
from torch import Tensor

from acefast.errors import InputError
from acefast.ops import AdamSettings, backend

_NAMES = [field.name for field in fields(AdamSettings)]


class MaskedAdam(torch.optim.Optimizer):
    """Adam on the factors of w = theta * mask, where w is what the module holds as its parameter.

    The module is run as it is: it sees w, and gives dL/dw as ``parameter.grad``. This optimiser keeps theta, the mask and
    their moments, of the kept elements only, and writes the new w into the parameter: the product rule, the decay, the L1
    subgradients and both updates are one pass over memory (``ops.masked_adam``). Removed elements are 0 in w; they have no
    state and cost nothing. Without masks theta is the parameter itself.

    Args:
        params: parameters (float32 or float64, dense), or groups as in torch.optim, each with its own settings and
            masks: [B] tensors like the parameters, or None for w = theta; their values at the time of the call are copied.
            keep: bool tensors like the parameters, or None; an element with False does not exist.
            compact: whether the state is of the kept elements alone, with their positions (default), or as large as the
                parameters, which takes less memory where more than about two thirds are kept.
            A parameter's values at the time of the call are theta.
        lr, beta1, beta2, eps, weight_decay, l1: of theta, as in torch.optim.Adam; l1 weighs the subgradient sign(theta).
        mask_lr, mask_beta1, ...: the same of the masks; each is theta's unless given, mask_weight_decay and mask_l1 are 0.
    Raises InputError for wrong shapes, dtypes or settings. Source: Adam, Kingma and Ba (ICLR 2015); soft masks trained
    with the weights, UGS, Chen et al. (ICML 2021).
    """

    def __init__(
        self, params, masks=None, keep=None, compact=True, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, l1=0.0,
        mask_lr=None, mask_beta1=None, mask_beta2=None, mask_eps=None, mask_weight_decay=0.0, mask_l1=0.0,
    ):  # fmt: skip
        theta = dict(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, l1=l1)
        mask = dict(lr=mask_lr, beta1=mask_beta1, beta2=mask_beta2, eps=mask_eps, weight_decay=mask_weight_decay, l1=mask_l1)
        defaults = theta | {f"mask_{name}": value for name, value in mask.items()}
        groups = list(params)
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups, "masks": masks, "keep": keep, "compact": compact}]
        super().__init__([{"masks": None, "keep": None, "compact": compact, **group} for group in groups], defaults)
        for group in self.param_groups:
            self._start(group)

    @torch.no_grad()
    def _start(self, group: dict) -> None:
        params = group["params"]
        masks, keep = (_checked(name, group.pop(name), params) for name in ("masks", "keep"))
        group["step"] = torch.zeros(1, dtype=torch.int64, device=params[0].device)
        for name in _NAMES:
            if group[f"mask_{name}"] is None:
                group[f"mask_{name}"] = group[name]
        sparse = keep is not None and not all(bool(part.all()) for part in keep)
        compact = group.pop("compact")
        for position, p in enumerate(params):
            flat = _flat(p.data)
            state = self.state[p]
            values = {"theta": flat}
            if masks is not None:
                values["mask"] = _flat(_laid_out(masks[position].detach(), p))
            if sparse:
                kept = _flat(_laid_out(keep[position], p))
                if compact:
                    place = kept.nonzero().squeeze(1)
                    values = {name: value[place] for name, value in values.items()}
                    state["place"] = place if flat.numel() > 2**31 else place.int()
                else:
                    state["keep"] = kept
            own = _is_theta(state | values)
            for name, value in values.items():
                state[name] = value if own or "place" in state else value.clone()
                state[f"{name}_mean"], state[f"{name}_square"] = (torch.zeros_like(state[name]) for _ in range(2))
            product = state["theta"] * state["mask"] if masks is not None else state["theta"]
            if "place" in state:
                flat.zero_()
                flat[state["place"].long()] = product
            elif not own:
                flat.copy_(product)
            if "keep" in state:
                flat.mul_(state["keep"])

    @torch.no_grad()
    def load_state_dict(self, state_dict) -> None:
        """As torch.optim, for the same kept elements; a parameter that is its own theta takes the value that was saved."""
        places = {p: {name: state[name] for name in ("place", "keep") if name in state} for p, state in self.state.items()}
        super().load_state_dict(state_dict)  # which gives all tensors the parameter's dtype
        for p, state in self.state.items():
            state.update(places[p])
            if _is_theta(state):
                flat = _flat(p.data)
                state["theta"] = flat.copy_(state["theta"])

    @torch.no_grad()
    def step(self, closure=None):
        """One step from the parameters' gradients. Raises InputError where one has none."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    @torch.no_grad()
    def update(self) -> None:
        """``step`` without the hooks of torch.optim, which cost more than the update of a small network."""
        for group in self.param_groups:
            params = group["params"]
            if any(p.grad is None for p in params):
                raise InputError("MaskedAdam: a parameter has no gradient; call backward() first, or leave it out")
            states = [self.state[p] for p in params]

            def all_of(name, states=states):
                return [state[name] for state in states] if name in states[0] else None

            # ops.masked_adam without its checks, which hold by construction
            backend.call(
                "masked_adam", [_flat(_laid_out(p.grad, p)) for p in params], all_of("place"), all_of("keep"), all_of("theta"),
                all_of("mask") or [], all_of("theta_mean"), all_of("theta_square"), all_of("mask_mean") or [],
                all_of("mask_square") or [], [] if _is_theta(states[0]) else [_flat(p.data) for p in params], group["step"],
                _settings(group, ""), _settings(group, "mask_"),
            )  # fmt: skip

    def factors(self, p: torch.nn.Parameter) -> list[Tensor]:
        """The parameter's own state that training changes: [theta] or [theta, mask] of the kept elements, in memory order."""
        return [self.state[p][name] for name in ("theta", "mask") if name in self.state[p]]

    def moments(self) -> list[Tensor]:
        """The moments of all factors and the numbers of steps taken: with the factors, all that a step goes on from."""
        states = [self.state[p] for group in self.param_groups for p in group["params"]]
        moments = [state[name] for state in states for name in state if name.endswith(("_mean", "_square"))]
        return moments + [group["step"] for group in self.param_groups]

    @torch.no_grad()
    def expand(self, p: torch.nn.Parameter, elements: Tensor, fill: Tensor | float = 0.0) -> Tensor:
        """A tensor like the parameter, contiguous, that holds ``elements`` (one for each kept element, in the order of
        ``factors``) at their places and ``fill`` elsewhere."""
        whole = torch.empty_like(p)
        whole.copy_(fill) if isinstance(fill, Tensor) else whole.fill_(fill)
        place, kept = (self.state[p].get(name) for name in ("place", "keep"))
        if place is not None:
            _flat(whole)[place.long()] = elements
        elif kept is not None:
            _flat(whole).copy_(elements.where(kept, _flat(whole)))
        else:
            _flat(whole).copy_(elements)
        return whole.contiguous()


def _is_theta(state: dict) -> bool:
    """Whether the parameter with this state is its own theta, sharing memory with it."""
    return "mask" not in state and "place" not in state


def _settings(group: dict, prefix: str) -> list[float]:
    return AdamSettings(*(group[prefix + name] for name in _NAMES)).values()


def _checked(name: str, tensors: Iterable[Tensor] | None, params: list[Tensor]) -> list[Tensor] | None:
    if tensors is None:
        return None
    tensors = list(tensors)
    shapes = [list(t.shape) for t in tensors]
    if shapes != [list(p.shape) for p in params]:
        raise InputError(f"MaskedAdam: {name} must be tensors like the parameters {[list(p.shape) for p in params]}, got {shapes}")
    return tensors


def _flat(t: Tensor) -> Tensor:
    """The elements of a dense tensor [numel] in the order in which they lie in memory, sharing it."""
    if t.is_contiguous():
        return t.view(-1)
    if t.dim() == 2 and t.t().is_contiguous():
        return t.t().view(-1)
    raise InputError(f"MaskedAdam: parameters must be contiguous or transposed matrices, got strides {t.stride()}")


def _laid_out(t: Tensor, like: Tensor) -> Tensor:
    """`t` with its elements in the memory order of `like`."""
    return t if t.stride() == like.stride() else torch.empty_like(like, dtype=t.dtype).copy_(t)
