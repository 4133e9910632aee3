"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, arXiv 1805.01978; DINO).

Training features are added in chunks and not kept; only the k nearest of each query are. The result does not depend on
the chunks or on the number of ranks: among equally near features, the lower sample index wins.
"""

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

_QUERIES = 8192  # queries per comparison; each pair of query and feature takes 20 bytes
_LARGEST_INDEX = 2**32 - 1


class Neighbours:
    """The `k` nearest of all added features for each query, by cosine similarity; 8 bytes per query and neighbour."""

    def __init__(self, queries: Float32[Tensor, "q d"], k: int) -> None:
        """`queries` have length 1."""
        self._queries, self._k = queries, k
        # Bits of the similarity above bits of the index: a larger key is nearer, or equally near with a lower index.
        self.keys: Int64[Tensor, "q k"] = torch.full(
            (len(queries), k), torch.iinfo(torch.int64).min, dtype=torch.int64, device=queries.device
        )

    def add(self, features: Float32[Tensor, "n d"], indices: Int64[Tensor, "n"]) -> None:
        """Compare all queries with `features` of length 1, whose distinct `indices` are in 0..2**32 - 1."""
        for start in range(0, len(self._queries), _QUERIES):
            part = slice(start, start + _QUERIES)
            bits = (self._queries[part] @ features.T).contiguous().view(torch.int32)  # (Q, N)
            ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # integers in the order of the floats
            self._keep(part, (ordered << 32) | (_LARGEST_INDEX - indices))

    def merge(self, keys: Int64[Tensor, "q k"]) -> None:
        """Add the `keys` that another rank found among other features."""
        self._keep(slice(None), keys)

    def nearest(self) -> tuple[Float32[Tensor, "q k"], Int64[Tensor, "q k"]]:
        """Similarities and indices, the nearest first; undefined until `k` features were added."""
        bits = (self.keys >> 32).to(torch.int32)
        bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        return bits.view(torch.float32), _LARGEST_INDEX - (self.keys & _LARGEST_INDEX)

    def _keep(self, part: slice, keys: Tensor) -> None:
        self.keys[part] = torch.cat([self.keys[part], keys], 1).topk(self._k, 1).values


def votes(
    similarities: Float32[Tensor, "q k"], labels: Int64[Tensor, "q k"], classes: int, temperature: float
) -> Float64[Tensor, "q classes"]:
    """Sum of exp(similarity / temperature) per class, divided by the weight of the nearest neighbour."""
    weights = ((similarities.double() - similarities[:, :1].double()) / temperature).exp()
    return weights.new_zeros(len(labels), classes).scatter_add_(1, labels, weights)
