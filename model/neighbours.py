"""Classification by the nearest neighbours of frozen features, weighted (Wu et al. 2018, arXiv 1805.01978; DINO).

Training features are shown a few at a time and forgotten; only the k nearest of each query stay. The answer is the same
in whatever portions, and by however many, they are shown: equally near ones are told apart by their numbers.
"""

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

_QUERIES = 8192  # at once against what is shown: 20 bytes for each pair
_LARGEST = 2**32 - 1


class Neighbours:
    """The `k` nearest of each query, by cosine, among all that was shown; state: 8 bytes a query and neighbour."""

    def __init__(self, queries: Float32[Tensor, "q d"], k: int) -> None:
        """`queries` have length 1."""
        self._queries, self._k = queries, k
        # A similarity's bits above a number's: what is larger is nearer, or as near and first.
        self.keys: Int64[Tensor, "q k"] = torch.full(
            (len(queries), k), torch.iinfo(torch.int64).min, dtype=torch.int64, device=queries.device
        )

    def show(self, features: Float32[Tensor, "n d"], numbers: Int64[Tensor, "n"]) -> None:
        """More of them, of length 1; `numbers` are in 0..2**32 - 1, each of another."""
        for start in range(0, len(self._queries), _QUERIES):
            part = slice(start, start + _QUERIES)
            bits = (self._queries[part] @ features.T).contiguous().view(torch.int32)  # (Q, N)
            ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # floats of either sign, as integers
            self._keep(part, (ordered << 32) | (_LARGEST - numbers))

    def merge(self, keys: Int64[Tensor, "q k"]) -> None:
        """What another found among others."""
        self._keep(slice(None), keys)

    def found(self) -> tuple[Float32[Tensor, "q k"], Int64[Tensor, "q k"]]:
        """Similarities and numbers, the nearest first; of no use before `k` were shown."""
        bits = (self.keys >> 32).to(torch.int32)
        bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        return bits.view(torch.float32), _LARGEST - (self.keys & _LARGEST)

    def _keep(self, part: slice, keys: Tensor) -> None:
        self.keys[part] = torch.cat([self.keys[part], keys], 1).topk(self._k, 1).values


def votes(
    similarities: Float32[Tensor, "q k"], labels: Int64[Tensor, "q k"], classes: int, temperature: float
) -> Float64[Tensor, "q classes"]:
    """Sum of exp(similarity / temperature) for each class, as a share of what the nearest alone would have."""
    weights = ((similarities.double() - similarities[:, :1].double()) / temperature).exp()
    return weights.new_zeros(len(labels), classes).scatter_add_(1, labels, weights)
