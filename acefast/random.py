"""Randomness from one seed through named streams, so that adding a consumer does not shift the others."""

import hashlib

import torch


def named_seed(seed: int, *names) -> int:
    """63-bit seed of the stream called `names` under `seed`: the first 8 bytes of BLAKE2b(seed, names), sign bit cleared.

    The same on every platform and Python version. `names` may be strings and integers.
    """
    text = "\x1f".join(str(part) for part in (int(seed), *names))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


def generator(seed: int, *names, device="cpu") -> torch.Generator:
    """A torch.Generator seeded with `named_seed(seed, *names)`."""
    return torch.Generator(device=device).manual_seed(named_seed(seed, *names))
