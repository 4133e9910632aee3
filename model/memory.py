"""Bytes that training takes on one rank, from the configuration: activations of an image, and the state under ZeRO.

Activations are what autograd keeps for the backward pass and what the backward pass holds beside it at its peak, with
fused attention, counted tensor by tensor (as Korthikanti et al. 2022, arXiv 2205.05198, section 4, do for GPT). The
state is that of mixed-precision Adam (Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1) as DeepSpeed lays it out
for bf16 weights and float32 gradient sums; docs/profiling.md has each formula with its check.
"""

from functools import lru_cache
from typing import NamedTuple

from maelstream.model.config import MAEConfig

BUCKET = 500_000_000
"""Elements of DeepSpeed's `reduce_bucket_size`."""
PERSISTENT = 100_000
"""Elements up to which stage 3 never lets go of a gathered parameter (`stage3_param_persistence_threshold`)."""
LIVE = 1_000_000_000
"""Elements of other parameters that stage 3 keeps from the forward to the backward pass
(`stage3_max_live_parameters`, `stage3_max_reuse_distance`)."""

ADAMW_BYTES = 28
"""What torch's fused AdamW moves per parameter: gradient, weight and two moments read, the last three written; all in
float32."""


class StateBytes(NamedTuple):
    """One rank's, when gradients are summed and the optimizer is about to step; `gathered` and `buckets` come and go.

    Of stage 3's `gathered`, `persistent` stays for good.
    """

    weights: int
    gradients: int
    master: int
    """Float32 weights."""
    moments: int
    persistent: int
    gathered: int
    """Whole weights of stage 3 while a forward or backward pass runs, without the persistent ones."""
    buckets: int
    """Where gradients are laid together to be reduced."""

    @property
    def resident(self) -> int:
        """What stays, without what comes and goes."""
        return self.weights + self.gradients + self.master + self.moments + self.persistent


@lru_cache(16)
def parameter_groups(config: MAEConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Elements of each trained tensor, in the groups and in the order of `weight_decay_groups(MAE(config), ...)`.

    The first group is that of vectors (biases, LayerNorms), which do not decay. They are computed from the
    configuration, so that planning needs no torch; a test compares them with the model's.
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
    """Elements of one block's vectors and of its matrices: norm, attention, norm, MLP."""
    hidden = int(dim * mlp_ratio)
    vectors = (dim, dim, 3 * dim, dim, dim, dim, hidden, dim)
    return vectors, (3 * dim * dim, dim * dim, hidden * dim, dim * hidden)


def parameter_count(config: MAEConfig) -> int:
    """Trained elements."""
    return sum(map(sum, parameter_groups(config)))


def state_bytes(config: MAEConfig, stage: int, ranks: int) -> StateBytes:
    """State of one of `ranks` ranks under ZeRO `stage` 1, 2 or 3.

    Stages 1 and 2 lay each group of the optimizer flat and fill it up to a multiple of 2 x ranks elements; stage 3
    fills each parameter up to a multiple of ranks. Stage 1 sums whole gradients in float32 beside autograd's in bf16.
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
    """A row of equal blocks, in bytes of one image."""

    depth: int
    stream: int
    """The residual stream between two blocks."""
    kept: int
    """What one block keeps for its backward pass, its input among it."""
    working: int
    """What its backward pass holds beside that at its peak: gradients of the stream and of the MLP's inside."""

    @classmethod
    def of(cls, tokens: int, dim: int, heads: int, depth: int, mlp_ratio: float, element: int) -> "_Stack":
        stream = tokens * dim * element
        # Inputs of both norms, both their outputs, query, key, value, the attention's output: 8 streams; before and
        # after GELU: 2 x mlp_ratio. Mean and deviation of two norms and the attention's log-sum-exp are float32.
        kept = round((8 + 2 * mlp_ratio) * stream) + tokens * 4 * (2 * 2 + heads)
        return cls(depth, stream, kept, round((1 + mlp_ratio) * stream))

    def all_kept(self, checkpointing: bool) -> int:
        return self.depth * (self.stream if checkpointing else self.kept)

    def peak(self, checkpointing: bool) -> int:
        """With the last block's backward pass under way."""
        recomputed = self.kept - self.stream if checkpointing else 0
        return self.all_kept(checkpointing) + recomputed + self.working


def activation_bytes(config: MAEConfig, checkpointing: bool, element: int) -> int:
    """What one more image adds to the peak of forward and backward; numbers of `element` bytes (2: bf16, 4: float32).

    Images, target and loss are float32 whatever `element` is.
    """
    places, removed = 1 + config.num_patches, config.num_patches - config.keep
    seen = places if config.encoder_mask_tokens else 1 + config.keep
    encoder = _Stack.of(seen, config.dim, config.heads, config.depth, config.mlp_ratio, element)
    decoder = _Stack.of(
        places, config.decoder_dim, config.decoder_heads, config.decoder_depth, config.mlp_ratio, element
    )
    pixels = 4 * config.num_patches * config.patch_dim
    given = pixels // 4 + config.keep * config.patch_dim * element  # bytes that came in, and kept patches to embed
    between = 2 * encoder.stream  # input and output of the encoder's norm
    kept = given + encoder.all_kept(checkpointing) + between + decoder.all_kept(checkpointing)
    # The blocks' output, its norm of removed places, prediction, target.
    head = decoder.stream + removed * config.decoder_dim * element + 2 * 4 * removed * config.target_dim
    # What `MAE.loss` holds until it returns: images and patches, and to make the target of, removed patches twice.
    held = 2 * pixels + 2 * 4 * removed * config.patch_dim
    return max(
        kept + head + held,
        given + encoder.all_kept(checkpointing) + between + decoder.peak(checkpointing),
        given + encoder.peak(checkpointing),
    )


def moved_bytes(config: MAEConfig, checkpointing: bool, element: int) -> int:
    """What the blocks' operators between matrix products read and write in memory for one image, forward and backward.

    In streams (tokens x dim) a block. Forward: two norms 4, two residual sums 6, GELU 2 x mlp_ratio. Backward: norms 6,
    sums of gradients 6, GELU 3 x mlp_ratio, gradients of biases 5 + mlp_ratio. Fused attention moves nothing here.
    """
    seen = 1 + (config.num_patches if config.encoder_mask_tokens else config.keep)
    streams = config.depth * seen * config.dim + config.decoder_depth * (1 + config.num_patches) * config.decoder_dim
    forward, backward = 10 + 2 * config.mlp_ratio, 17 + 4 * config.mlp_ratio
    return round(streams * element * (forward * (2 if checkpointing else 1) + backward))


def update_bytes(parameters: int, stage: int, ranks: int) -> float:
    """Bytes that an optimizer step reads and writes in one rank's memory, without collectives and without clipping.

    Counted over the operators of DeepSpeed 0.19.8 with bf16 weights and float32 gradient sums. Per parameter of the
    rank's share, AdamW moves `ADAMW_BYTES`, and the copy to bf16 reads 4 and writes 2. Stage 1 also passes over the gradients of all parameters: the norm reads 4 bytes, and
    they are set to zero twice (8). Stages 2 and 3 pass over the gradients of the share only: the norm widens them to
    float64 (20), and the overflow check (stage 2) or the scaling (stage 3) takes 8.
    """
    share = parameters / ranks
    if stage == 1:
        return (ADAMW_BYTES + 6) * share + (4 + 8) * parameters
    return (ADAMW_BYTES + 6 + 20 + 8) * share


class Traffic(NamedTuple):
    """Bytes of a rank's collectives in one optimizer step, by kind: of what is reduced, or of the gathered whole."""

    all_reduced: int
    reduce_scattered: int
    gathered: int

    def sent(self, ranks: int) -> float:
        """What each rank sends around a ring (Thakur et al. 2005; NCCL's tests count alike)."""
        return (2 * self.all_reduced + self.reduce_scattered + self.gathered) * (ranks - 1) / ranks


def traffic(config: MAEConfig, stage: int, ranks: int, micro_batches: int) -> Traffic:
    """What DeepSpeed 0.19.8 sends under ZeRO `stage`: gradients in float32, weights in bf16.

    Stage 1 reduces once a step, stages 2 and 3 every micro-batch, stage 2 by an all-reduce of which each rank keeps its
    part. Stage 3 gathers large weights for every forward pass and keeps them (up to `LIVE` elements) until the backward
    pass is through; beyond that it gathers them twice.
    """
    groups = parameter_groups(config)
    sizes = [size for group in groups for size in group]
    if stage == 3:
        filled = [-(-size // ranks) * ranks for size in sizes]
        small = sum(each for each, size in zip(filled, sizes, strict=True) if size <= PERSISTENT)
        large = sum(filled) - small
        again = micro_batches * (1 if large <= LIVE else 2)
        return Traffic(0, 4 * sum(filled) * micro_batches, 2 * (small + again * large))
    flat = sum(-(-sum(group) // (2 * ranks)) * 2 * ranks for group in groups)
    return Traffic(4 * (flat if stage == 1 else sum(sizes) * micro_batches), 0, 2 * flat)
