"""Nearest neighbours and their votes equal scikit-learn, for any chunks and number of ranks."""

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


def nearest(queries: Tensor, features: Tensor, chunk: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Neighbours that `ranks` ranks find, when each gets its share of the features in chunks."""
    found = [Neighbours(queries, K) for _ in range(ranks)]
    for number, start in enumerate(range(0, len(features), chunk)):
        indices = torch.arange(start, min(start + chunk, len(features)))
        found[number % ranks].add(features[indices], indices)
    for other in found[1:]:
        found[0].merge(other.keys)
    return found[0].nearest()


@pytest.mark.parametrize(("chunk", "ranks"), [(300, 1), (1, 1), (7, 2), (64, 3)])
def test_neighbours_and_votes_equal_scikit_learn_for_any_chunks_and_ranks(chunk: int, ranks: int) -> None:
    train, queries = drawn(300, 0), drawn(50, 1)
    labels = torch.randint(CLASSES, (300,), generator=torch.Generator().manual_seed(2))
    similarities, indices = nearest(queries, train, chunk, ranks)
    expected = KNeighborsClassifier(
        K, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE)
    ).fit(train.numpy(), labels.numpy())
    _, expected_indices = expected.kneighbors(queries.numpy())
    assert indices.tolist() == expected_indices.tolist()
    assert (similarities - (queries[:, None] * train[indices]).sum(-1)).abs().max() < 1e-6
    ballot = votes(similarities, labels[indices], CLASSES, TEMPERATURE)
    shares = ballot / ballot.sum(1, keepdim=True)
    assert shares.argmax(1).tolist() == expected.predict(queries.numpy()).tolist()
    np.testing.assert_allclose(shares, expected.predict_proba(queries.numpy()), rtol=0, atol=1e-5)


def test_among_equally_near_features_the_lower_index_comes_first_for_any_chunks() -> None:
    """There are similarities of -1, 0 and 1, each a hundred times."""
    axis = torch.eye(3)
    train = torch.cat([axis[:1], axis[1:2], -axis[:1]]).repeat(100, 1)
    for chunk in (300, 11):
        similarities, indices = nearest(axis[:1], train, chunk, 2)
        assert indices.tolist() == [[0, 3, 6, 9, 12, 15, 18]] and (similarities == 1).all()
    few = Neighbours(axis[:1], 3)
    few.add(train[:3], torch.tensor([4_000_000_000, 5, 6]))
    assert few.nearest()[1].tolist() == [[4_000_000_000, 5, 6]] and few.nearest()[0].tolist() == [[1, 0, -1]]


def test_votes_do_not_overflow_at_a_low_temperature() -> None:
    ballot = votes(torch.tensor([[1.0, 0.5]]), torch.tensor([[2, 0]]), 3, 1e-4)
    assert ballot.tolist() == [[0, 0, 1]]
