"""How much is removed when."""

from fractions import Fraction


def prune_count(remaining: int, fraction: float) -> int:
    """floor(fraction * remaining), with the fraction taken as the decimal it is written as."""
    return remaining * Fraction(repr(fraction)) // 1


def ladder(total: int, fraction: float, rounds: int) -> list[int]:
    """Elements kept after rounds 0, 1, ..., ``rounds`` of removing floor(fraction * remaining)."""
    kept = [total]
    for _ in range(rounds):
        kept.append(kept[-1] - prune_count(kept[-1], fraction))
    return kept


def exchange_count(rate: float, kept: int, removed: int) -> int:
    """max(1, round(rate * min(kept, removed))) where something is kept and removed and the rate is not 0."""
    smaller = min(kept, removed)
    return max(1, round(rate * smaller)) if smaller and rate else 0
