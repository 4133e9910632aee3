"""The nearest neighbours and their votes: scikit-learn's, in whatever portions they are shown."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn import functional as F

from maelstream.model.neighbours import Neighbours, votes

K, CLASSES, TEMPERATURE = 7, 5, 0.07


def drawn(count: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)), dim=1)


def nearest(queries: Tensor, features: Tensor, portion: int, ranks: int) -> tuple[Tensor, Tensor]:
    """As so many ranks find them, each shown its share in portions."""
    found = [Neighbours(queries, K) for _ in range(ranks)]
    for number, start in enumerate(range(0, len(features), portion)):
        numbers = torch.arange(start, min(start + portion, len(features)))
        found[number % ranks].add(features[numbers], numbers)
    for other in found[1:]:
        found[0].merge(other.keys)
    return found[0].nearest()


@pytest.mark.parametrize(("portion", "ranks"), [(300, 1), (1, 1), (7, 2), (64, 3)])
def test_they_are_scikit_learn_s_for_any_portions_and_ranks(portion: int, ranks: int) -> None:
    train, queries = drawn(300, 0), drawn(50, 1)
    labels = torch.randint(CLASSES, (300,), generator=torch.Generator().manual_seed(2))
    similarities, numbers = nearest(queries, train, portion, ranks)
    expected = KNeighborsClassifier(
        K, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE)
    ).fit(train.numpy(), labels.numpy())
    _, theirs = expected.kneighbors(queries.numpy())
    assert numbers.tolist() == theirs.tolist()
    assert (similarities - (queries[:, None] * train[numbers]).sum(-1)).abs().max() < 1e-6
    ballot = votes(similarities, labels[numbers], CLASSES, TEMPERATURE)
    shares = ballot / ballot.sum(1, keepdim=True)
    assert shares.argmax(1).tolist() == expected.predict(queries.numpy()).tolist()
    np.testing.assert_allclose(shares, expected.predict_proba(queries.numpy()), rtol=0, atol=1e-5)


def test_of_equally_near_ones_the_lower_number_comes_first_in_any_portions() -> None:
    """Similarities of -1, 0 and 1, each a hundred times."""
    axis = torch.eye(3)
    train = torch.cat([axis[:1], axis[1:2], -axis[:1]]).repeat(100, 1)
    for portion in (300, 11):
        similarities, numbers = nearest(axis[:1], train, portion, 2)
        assert numbers.tolist() == [[0, 3, 6, 9, 12, 15, 18]] and (similarities == 1).all()
    few = Neighbours(axis[:1], 3)
    few.add(train[:3], torch.tensor([4_000_000_000, 5, 6]))
    assert few.nearest()[1].tolist() == [[4_000_000_000, 5, 6]] and few.nearest()[0].tolist() == [[1, 0, -1]]


def test_votes_do_not_overflow_at_a_low_temperature() -> None:
    ballot = votes(torch.tensor([[1.0, 0.5]]), torch.tensor([[2, 0]]), 3, 1e-4)
    assert ballot.tolist() == [[0, 0, 1]]
