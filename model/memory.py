"""Memory and memory traffic of training on one rank, computed from the configuration, without torch.

Activations are what autograd keeps for the backward pass, plus what the backward pass itself holds at its peak. They
are counted tensor by tensor, with fused attention (as Korthikanti et al. 2022, arXiv 2205.05198, section 4, for GPT).
The state is that of mixed-precision Adam (Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1) as DeepSpeed stores
it for bf16 weights and float32 gradient sums. docs/profiling.md lists each formula with its check.
"""

from functools import lru_cache
from typing import NamedTuple

from maelstream.model.config import MAEConfig

BUCKET = 500_000_000
"""Elements in a gradient bucket (DeepSpeed's `reduce_bucket_size`)."""
PERSISTENT = 100_000
"""Stage 3 never releases gathered parameters of up to this many elements (`stage3_param_persistence_threshold`)."""
LIVE = 1_000_000_000
"""Elements of larger parameters that stage 3 keeps from the forward to the backward pass
(`stage3_max_live_parameters`, `stage3_max_reuse_distance`)."""

ADAMW_BYTES = 28
"""Bytes per parameter that torch's fused AdamW moves: it reads gradient, weight and two moments, and writes weight and
moments; all are float32."""


class StateBytes(NamedTuple):
    """Bytes of one rank's state when gradients are summed and the optimizer is about to step.

    `gathered` and `buckets` are temporary; all other fields stay allocated.
    """

    weights: int
    gradients: int
    master: int
    """Float32 master weights."""
    moments: int
    persistent: int
    """Small weights that stage 3 keeps gathered."""
    gathered: int
    """Large weights that stage 3 gathers during a forward or backward pass."""
    buckets: int
    """Buffers in which gradients are reduced."""

    @property
    def resident(self) -> int:
        """Bytes that stay allocated."""
        return self.weights + self.gradients + self.master + self.moments + self.persistent


@lru_cache(16)
def parameter_groups(config: MAEConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Number of elements of each trained tensor, grouped and ordered as by `weight_decay_groups(MAE(config), ...)`.

    The first group has the vectors (biases, LayerNorms), which do not decay. A test compares the result with a model.
    """
    encoder, decoder = (_block_elements(dim, config.mlp_ratio) for dim in (config.dim, config.decoder_dim))
    token = config.dim if config.encoder_mask_tokens else config.decoder_dim
    vectors = (
        (config.dim,),  # patch projection
        encoder[0] * config.depth,
        (config.dim, config.dim, config.decoder_dim),  # encoder's norm, projection to the decoder
        decoder[0] * config.decoder_depth,
        (config.decoder_dim, config.decoder_dim, config.target_dim),  # decoder's norm, head
    )
    matrices = (
        (config.dim, token, config.dim * config.patch_dim),  # class token, mask token, patch projection
        encoder[1] * config.depth,
        (config.decoder_dim * config.dim,),
        decoder[1] * config.decoder_depth,
        (config.target_dim * config.decoder_dim,),
    )
    return sum(vectors, ()), sum(matrices, ())


def _block_elements(dim: int, mlp_ratio: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Number of elements of each vector and of each matrix of a block, in the order norm, attention, norm, MLP."""
    hidden = int(dim * mlp_ratio)
    vectors = (dim, dim, 3 * dim, dim, dim, dim, hidden, dim)
    return vectors, (3 * dim * dim, dim * dim, hidden * dim, dim * hidden)


def parameter_count(config: MAEConfig) -> int:
    """Number of trained parameters."""
    return sum(map(sum, parameter_groups(config)))


def state_bytes(config: MAEConfig, stage: int, ranks: int) -> StateBytes:
    """State of one of `ranks` ranks under ZeRO `stage` 1, 2 or 3.

    Stages 1 and 2 flatten each optimizer group and pad it to a multiple of 2 x ranks elements; stage 3 pads each
    parameter to a multiple of ranks. Stage 1 keeps float32 sums of all gradients as well as autograd's bf16 gradients.
    """
    groups = parameter_groups(config)
    sizes = [size for group in groups for size in group]
    count = sum(sizes)
    if stage == 3:
        share = sum(-(-size // ranks) for size in sizes)
        kept = sum(-(-size // ranks) * ranks for size in sizes if size <= PERSISTENT)
        others = sum(-(-size // ranks) * ranks for size in sizes if size > PERSISTENT)
        return StateBytes(
            2 * share,
            4 * share,
            4 * share,
            8 * share,
            2 * kept,
            2 * min(others, LIVE),
            4 * (BUCKET + min(count, BUCKET)),
        )
    flat = sum(-(-sum(group) // (2 * ranks)) * 2 * ranks for group in groups)
    share = flat // ranks
    if stage == 2:
        return StateBytes(2 * flat, 4 * share, 4 * share, 8 * share, 0, 0, 2 * BUCKET + 4 * min(count, BUCKET))
    return StateBytes(2 * flat, 4 * flat + 2 * count, 4 * share, 8 * share, 0, 0, 4 * min(count, BUCKET))


class _Stack(NamedTuple):
    """A stack of equal blocks; sizes are bytes per image."""

    depth: int
    stream: int
    """The residual stream between two blocks."""
    kept: int
    """Tensors that one block keeps for its backward pass, including its input."""
    working: int
    """Further tensors at the peak of its backward pass: gradients of the stream and of the MLP's hidden layer."""

    @classmethod
    def from_sizes(cls, tokens: int, dim: int, heads: int, depth: int, mlp_ratio: float, element: int) -> "_Stack":
        stream = tokens * dim * element
        # 8 streams: input and output of both norms, query, key, value, output of attention; 2 x mlp_ratio streams:
        # input and output of GELU. Mean and deviation of two norms and attention's log-sum-exp are float32.
        kept = round((8 + 2 * mlp_ratio) * stream) + tokens * 4 * (2 * 2 + heads)
        return cls(depth, stream, kept, round((1 + mlp_ratio) * stream))

    def all_kept(self, checkpointing: bool) -> int:
        return self.depth * (self.stream if checkpointing else self.kept)

    def peak(self, checkpointing: bool) -> int:
        """Bytes while the backward pass of the last block runs."""
        recomputed = self.kept - self.stream if checkpointing else 0
        return self.all_kept(checkpointing) + recomputed + self.working


def activation_bytes(config: MAEConfig, checkpointing: bool, element: int) -> int:
    """Bytes that each image adds to the peak of a forward and backward pass.

    `element` is the size of a number in the model: 2 for bf16, 4 for float32. Images, target and loss are always
    float32.
    """
    all_tokens, removed = 1 + config.num_patches, config.num_patches - config.keep
    encoder_tokens = all_tokens if config.encoder_mask_tokens else 1 + config.keep
    encoder = _Stack.from_sizes(encoder_tokens, config.dim, config.heads, config.depth, config.mlp_ratio, element)
    decoder = _Stack.from_sizes(
        all_tokens, config.decoder_dim, config.decoder_heads, config.decoder_depth, config.mlp_ratio, element
    )
    pixels = 4 * config.num_patches * config.patch_dim
    inputs = pixels // 4 + config.keep * config.patch_dim * element  # uint8 images, and the kept patches to embed
    between = 2 * encoder.stream  # input and output of the encoder's norm
    kept = inputs + encoder.all_kept(checkpointing) + between + decoder.all_kept(checkpointing)
    # Output of the blocks; for removed patches: output of the norm, prediction, target.
    head = decoder.stream + removed * config.decoder_dim * element + 2 * 4 * removed * config.target_dim
    # Held by `MAE.loss` until it returns: images, patches, and the removed patches twice, to compute the target.
    held_by_loss = 2 * pixels + 2 * 4 * removed * config.patch_dim
    return max(
        kept + head + held_by_loss,
        inputs + encoder.all_kept(checkpointing) + between + decoder.peak(checkpointing),
        inputs + encoder.peak(checkpointing),
    )


def moved_bytes(config: MAEConfig, checkpointing: bool, element: int) -> int:
    """Bytes per image that the blocks read and write outside of matrix products, in a forward and backward pass.

    Counted per block in streams (tokens x dim). Forward: two norms 4, two residual sums 6, GELU 2 x mlp_ratio.
    Backward: norms 6, sums of gradients 6, GELU 3 x mlp_ratio, gradients of biases 5 + mlp_ratio. Fused attention adds
    nothing.
    """
    encoder_tokens = 1 + (config.num_patches if config.encoder_mask_tokens else config.keep)
    encoder_stream, decoder_stream = encoder_tokens * config.dim, (1 + config.num_patches) * config.decoder_dim
    streams = config.depth * encoder_stream + config.decoder_depth * decoder_stream
    forward, backward = 10 + 2 * config.mlp_ratio, 17 + 4 * config.mlp_ratio
    return round(streams * element * (forward * (2 if checkpointing else 1) + backward))


def update_bytes(parameters: int, stage: int, ranks: int) -> float:
    """Bytes that an optimizer step reads and writes in one rank's memory, without collectives and without clipping.

    Counted over the operators of DeepSpeed 0.19.8 with bf16 weights and float32 gradient sums. Per parameter of the
    rank's share, AdamW moves `ADAMW_BYTES`, and the copy to bf16 reads 4 bytes and writes 2. Stage 1 also passes over
    the gradients of all parameters: the norm reads 4 bytes, and they are set to zero twice (8). Stages 2 and 3 pass
    over the gradients of the share only: the norm widens them to float64 (20), and the overflow check (stage 2) or the
    scaling (stage 3) takes 8. Stage 3 also copies them into one flat tensor (8).
    """
    share = parameters / ranks
    if stage == 1:
        return (ADAMW_BYTES + 6) * share + (4 + 8) * parameters
    return (ADAMW_BYTES + 6 + 20 + (8 if stage == 2 else 16)) * share


class Traffic(NamedTuple):
    """Bytes of one rank's collectives per optimizer step: of the reduced tensors, or of the gathered result."""

    all_reduced: int
    reduce_scattered: int
    gathered: int

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends around a ring (Thakur et al. 2005; NCCL's tests use the same formula)."""
        return (2 * self.all_reduced + self.reduce_scattered + self.gathered) * (ranks - 1) / ranks


def traffic(config: MAEConfig, stage: int, ranks: int, micro_batches: int) -> Traffic:
    """Collectives of DeepSpeed 0.19.8 under ZeRO `stage`, with gradients in float32 and weights in bf16.

    Stage 1 reduces once per step, stages 2 and 3 once per micro-batch; stage 2 uses an all-reduce, of which each rank
    keeps its share. Stage 3 gathers large weights for each forward pass and keeps up to `LIVE` elements of them until
    the end of the backward pass; if there are more, it gathers them twice.
    """
    groups = parameter_groups(config)
    sizes = [size for group in groups for size in group]
    if stage == 3:
        padded = [-(-size // ranks) * ranks for size in sizes]
        small = sum(each for each, size in zip(padded, sizes, strict=True) if size <= PERSISTENT)
        large = sum(padded) - small
        gathers = micro_batches * (1 if large <= LIVE else 2)
        return Traffic(0, 4 * sum(padded) * micro_batches, 2 * (small + gathers * large))
    flat = sum(-(-sum(group) // (2 * ranks)) * 2 * ranks for group in groups)
    return Traffic(4 * (flat if stage == 1 else sum(sizes) * micro_batches), 0, 2 * flat)
