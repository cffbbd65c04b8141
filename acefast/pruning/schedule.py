"""How much is removed when. A schedule is the list of elements kept after rounds 0, 1, ..., rounds: whole numbers that
never rise."""

from fractions import Fraction

from acefast.errors import InputError


def prune_count(remaining: int, fraction: float) -> int:
    """floor(fraction * remaining), with the fraction taken as the decimal it is written as."""
    return remaining * _decimal(fraction) // 1


def _decimal(fraction: float) -> Fraction:
    return Fraction(repr(float(fraction)))


def ladder(total: int, fraction: float, rounds: int) -> list[int]:
    """The geometric ladder: each round removes floor(fraction * remaining)."""
    kept = [total]
    for _ in range(rounds):
        kept.append(kept[-1] - prune_count(kept[-1], fraction))
    return kept


def one_shot(total: int, sparsity: float, rounds: int = 1) -> list[int]:
    """floor(sparsity * total) removed in round 1, nothing after."""
    return [total] + [total - prune_count(total, sparsity)] * rounds


def cubic(total: int, sparsity: float, rounds: int, initial: float = 0.0) -> list[int]:
    """Gradual pruning: total - floor(s_t * total) kept after round t, with
    s_t = s_f + (s_i - s_f) (1 - t / rounds)^3, s_i = `initial` and s_f = `sparsity` (Zhu and Gupta, 2017).

    Exact: no rounding before the floor. Raises InputError unless 0 <= initial <= sparsity <= 1 and rounds >= 1.
    """
    if not 0 <= initial <= sparsity <= 1:
        raise InputError(f"cubic: expected 0 <= initial <= sparsity <= 1, got initial {initial}, sparsity {sparsity}")
    if rounds < 1:
        raise InputError(f"cubic: rounds must be 1 or more, got {rounds}")
    start, end = _decimal(initial), _decimal(sparsity)
    shares = (end + (start - end) * Fraction(rounds - t, rounds) ** 3 for t in range(rounds + 1))
    return [total - share * total // 1 for share in shares]


def exchange_count(rate: float, kept: int, removed: int) -> int:
    """max(1, round(rate * min(kept, removed))) where something is kept and removed and the rate is not 0."""
    smaller = min(kept, removed)
    return max(1, round(rate * smaller)) if smaller and rate else 0
