import math

import pytest
import torch

from acefast.data.metrics import accuracy, hits, rocauc

NAN = math.nan


def area(scores, y):
    """By the definition: over all pairs of a positive and a negative."""
    apart = scores[y == 1][:, None] - scores[y == 0]
    return float(((apart > 0).double() + (apart == 0).double() / 2).mean())


def test_accuracy():
    scores = torch.tensor([[0.0, 1, 2], [5, 1, 2], [0, 3, 1], [1, 0, 0]])
    assert accuracy(scores, torch.tensor([2, 0, 2, 0])) == 0.75


def test_rocauc_by_hand():
    y = torch.tensor([[1.0], [0], [1], [0]])
    assert rocauc(torch.tensor([[4.0], [1], [3], [2]]), y) == 1
    assert rocauc(torch.tensor([[1.0], [4], [2], [3]]), y) == 0
    assert rocauc(torch.ones(4, 1), y) == 0.5
    assert rocauc(torch.tensor([[3.0], [1], [1], [0]]), y) == (1 + 1 + 0.5 + 1) / 4


@pytest.mark.parametrize("seed", range(5))
def test_rocauc_is_the_mean_over_labels_with_both_classes(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 12, (60, 9), generator=generator).float() / 7  # many ties
    y = torch.randint(0, 2, (60, 9), generator=generator).float()
    y[torch.rand(60, 9, generator=generator) < 0.3] = NAN
    y[:, 3], y[:, 5], y[:, 7] = 1, 0, NAN
    wanted = [area(scores[:, i], y[:, i]) for i in (0, 1, 2, 4, 6, 8)]
    assert rocauc(scores, y) == pytest.approx(sum(wanted) / 6, abs=1e-12)
    assert rocauc(scores.half(), y) == pytest.approx(rocauc(scores.half().float(), y), abs=1e-12)


def test_rocauc_of_nan_scores_is_nan():
    y = torch.tensor([[1.0, 1], [0, 0]])
    assert math.isnan(rocauc(torch.tensor([[NAN, 1], [0, 0]]), y))


def test_hits_by_hand():
    positive, negative = torch.tensor([5.0, 3, 3.5, 1]), torch.tensor([4.0, 3, 2, 1])
    assert [hits(positive, negative, k) for k in (1, 2, 3, 4, 5)] == [0.25, 0.5, 0.75, 0.75, 1]


def test_refused(refusal):
    assert "[3, 2] and [2]" in refusal(accuracy, torch.ones(3, 2), torch.ones(2))
    assert "[3, 2] and [3]" in refusal(rocauc, torch.ones(3, 2), torch.ones(3))
    assert "no label has both" in refusal(rocauc, torch.ones(2, 2), torch.tensor([[1.0, NAN], [1, 0]]))
    assert "[0] and [2]" in refusal(hits, torch.ones(0), torch.ones(2), 1)
