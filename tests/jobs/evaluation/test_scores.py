"""Top-1 and top-5 hits agree with a stable sort of the logits."""

import torch

from maelstream.jobs.evaluation.scores import hits


def test_hits_agree_with_a_stable_sort_for_each_head() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 4, (3, 200, 12), generator=generator).float()  # many are equal
    labels = torch.randint(12, (200,), generator=generator)
    order = logits.argsort(dim=-1, descending=True, stable=True)
    expected = order == labels[:, None]
    found = hits(logits, labels)
    assert torch.equal(found[..., 0], expected[..., 0]) and torch.equal(found[..., 1], expected[..., :5].any(-1))


def test_fewer_than_five_classes_are_all_among_the_first_five() -> None:
    assert hits(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([0])).tolist() == [[False, True]]


def test_nan_logits_hit_nothing() -> None:
    logits = torch.full((2, 8), float("nan"))
    logits[1, 3] = 1.0
    assert not hits(logits, torch.tensor([0, 3])).any()
