"""What training takes in memory, part by part: an engine, a micro-batch, and the most of both at one time.

All in bytes on one rank. What DeepSpeed 0.19 holds was read off its code and off runs of one engine alone; the whole is
held to measured runs in tests/test_memory_measured.py and docs/scaling.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_fast.config import TrainerConfig
from rlhf_fast.engine import MAX_BUCKET
from rlhf_fast.models.head import LOGITS_BYTES
from rlhf_fast.ops._head_chunks import CHUNK_ROWS

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# glibc gives freed blocks of this size and more back to the system at once. Smaller ones stay in its heap, for the next
# that fit, and the holes that none fits add up: by the eighth step of the runs in docs/scaling.md to SLACK of that part
# which comes and goes in a step (0.2 to 1.0 of it, in one run 2). On a GPU nothing was measured and nothing is counted.
POOLED_BYTES = 32 << 20
SLACK = 0.4
FLATTENED = 500_000_000  # elements that DeepSpeed copies into one tensor to send them, without ZeRO


@dataclass(frozen=True)
class Shape:
    """What memory depends on in a causal LM."""

    parameters: int
    trained: int  # of them: all, or the adapters
    layers: int
    hidden: int
    intermediate: int
    kv_width: int  # key-value heads times head size
    vocabulary: int
    tied: bool  # the head's weight is the embedding's
    kept: int  # numbers a token that one layer keeps for the backward pass: kept_by_layer


def kept_by_layer(
    hidden: int, intermediate: int, kv_width: int, *, norms_trained: bool = True, mlp_trained: bool = True
) -> int:
    """Numbers a token that a Llama's layer keeps. For each of two norms its input, the normalised input (for the
    gradient of its weight) and its output; queries, keys, values and what attention makes of them; the gate before and
    after its activation, the other half of the MLP, and their product. With adapters the norms' weights are frozen, and
    a linear layer without an adapter keeps no input: the MLP's are the second norm's output and the product."""
    norms = 6 * hidden if norms_trained else 4 * hidden
    attention = 2 * hidden + 2 * kv_width
    mlp = 4 * intermediate
    return norms + attention + mlp - (0 if mlp_trained else hidden + intermediate)


@dataclass(frozen=True)
class EngineMemory:
    """One trained model in DeepSpeed."""

    weights: float
    optimizer: float  # Adam's moments, and fp32 master weights under ZeRO and in half precision
    gradients: float  # from the first backward pass to the step
    standing: float  # of the gradients: what is there between steps, too
    bucket: float  # a buffer that is there while a backward pass fills it
    sending: float  # besides, at the end of a backward pass


def engine_memory(shape: Shape, config: TrainerConfig, ranks: int) -> EngineMemory:
    """ZeRO (Rajbhandari et al. 2020) splits the optimiser among the ranks from stage 1, gradients from 2, weights from
    3. Frozen weights are in `weights`, whole below stage 3."""
    half, width = config.dtype in ("bfloat16", "float16"), BYTES[config.dtype]
    n, weights = shape.trained, float(width * shape.parameters)
    stage = max(config.zero_stage, 1 if half else 0)  # the engine's own rule
    alone = ranks == 1
    if stage == 0:
        sending = 0 if alone else width * min(n, FLATTENED)
        return EngineMemory(weights, 2 * width * n, width * n, 0, 0, sending)
    master = 12 * n / ranks  # fp32 weights and two moments
    if stage == 1 and half:  # BF16_Optimizer sums gradients in an fp32 copy of them all
        sending = 0 if alone else 4 * min(n, FLATTENED)
        return EngineMemory(weights, master, 6 * n, 4 * n, 0, sending)
    if stage == 1:  # the gradients and a buffer of as many, until the last micro-batch's are reduced
        return EngineMemory(weights, master, 8 * n, 0, 0, 4 * n / ranks)
    bucket = 4.0 * min(n, MAX_BUCKET)
    if stage == 2:
        return EngineMemory(weights, master, 4 * n / ranks, 0, bucket, bucket)
    return EngineMemory(weights / ranks, master, 4 * n / ranks + bucket, 4 * n / ranks + bucket, bucket, bucket)


@dataclass(frozen=True)
class MicroBatch:
    """The largest forward and backward of one optimiser step on one rank."""

    tokens: int  # padding included
    wanted: int  # tokens that the head looks at; 0 for a scalar model
    several: bool  # more of them before the step


def micro_batch(rows: int, length: int, budget: int, *, wanted_in_row: int) -> MicroBatch:
    """Of `rows` rows of `length` tokens, as many as `budget` tokens hold, and one at least."""
    together = min(max(rows, 1), max(1, budget // length))
    return MicroBatch(together * length, together * wanted_in_row, rows > together)


@dataclass(frozen=True)
class Pass:
    """A trained model's part in the step: its engine and what its forward leaves for the backward pass."""

    engine: EngineMemory
    activations: float  # at the start of the backward pass, the head's gradient included
    last: float  # at its end, beside the gradients
    pooled: float  # of all that, gradients too, what comes in blocks that the allocator keeps


def model_pass(shape: Shape, config: TrainerConfig, engine: EngineMemory, batch: MicroBatch, *, on_gpu: bool) -> Pass:
    """What one micro-batch takes of a trained model."""
    width = BYTES[config.dtype]
    body, inside = _body(shape, config, batch.tokens)
    head, head_gradient = _head(shape, config, batch.wanted, on_gpu=on_gpu)
    embedding = shape.vocabulary * shape.hidden * width if shape.trained == shape.parameters else 0
    last = embedding if batch.wanted and shape.tied else 0  # the embedding's, before it is added to the head's
    pooled = 0.0
    if not on_gpu:
        pooled += max(0.0, engine.gradients - engine.standing - embedding)
        pooled += body if batch.tokens * shape.intermediate * width < POOLED_BYTES else 0
    return Pass(engine, body + max(inside, head + head_gradient), last, pooled)


def training_peak(passes: Sequence[Pass], *, several: bool) -> float:
    """The most at one time beside weights and optimiser, where the models' backward passes follow one another.

    Gradients come as activations go: at the start of a backward pass there are all activations, at its end all
    gradients. With several micro-batches all gradients are there from the second one on.
    """
    held = sum(p.engine.gradients if several else p.engine.standing for p in passes)
    peak = 0.0
    for p in passes:
        peak = max(peak, held + p.engine.bucket + p.activations)
        held += 0 if several else p.engine.gradients - p.engine.standing
        peak = max(peak, held + p.engine.bucket + p.engine.sending + p.last)
    return peak


def slack(passes: Sequence[Pass]) -> float:
    """What the allocator holds of memory that is free: holes between blocks in use, which later ones do not fill."""
    return SLACK * max((p.pooled for p in passes), default=0.0)


def frozen_forward(shape: Shape, config: TrainerConfig, batch: MicroBatch, *, on_gpu: bool) -> float:
    """A forward without a gradient: one layer's tensors at a time, and the logits."""
    head, _ = _head(shape, config, batch.wanted, on_gpu=on_gpu)
    return max(batch.tokens * shape.kept * BYTES[config.dtype], head)


def cache(shape: Shape, config: TrainerConfig, rows: int, length: int) -> float:
    """Keys and values of so many rows while they are decoded."""
    return 2.0 * shape.layers * shape.kv_width * rows * length * BYTES[config.dtype]


def _body(shape: Shape, config: TrainerConfig, tokens: int) -> tuple[float, float]:
    """(what the layers keep, what one layer takes while it is made again and differentiated)."""
    width = BYTES[config.dtype]
    half = config.dtype in ("bfloat16", "float16")
    layer = tokens * (shape.kept * width + (4 * shape.hidden if half else 0))  # norms compute in fp32
    ends = 2.0 * tokens * shape.hidden * max(width, 4)  # of the last norm
    if not config.gradient_checkpointing:
        return shape.layers * layer + ends, 0
    gradients = 3 * tokens * shape.intermediate * width  # of the MLP's product and both its factors
    return shape.layers * tokens * shape.hidden * width + ends, layer + gradients


def _head(shape: Shape, config: TrainerConfig, wanted: int, *, on_gpu: bool) -> tuple[float, float]:
    """(logits and what is cast for them, gradients of the weight and of the states): see models/head.py."""
    if not wanted:
        return 0, 0
    width = BYTES[config.dtype]
    full = max(width, 4)  # logits are in fp32 at least
    logits, weight = full * wanted * shape.vocabulary, full * shape.vocabulary * shape.hidden
    trained = shape.trained == shape.parameters
    states = full * wanted * shape.hidden
    gradient = (weight if trained else 0) + states
    if logits <= LOGITS_BYTES:
        cast = weight + states if width < full else 0
        return logits + cast + states, gradient
    rows = CHUNK_ROWS["cuda" if on_gpu else "cpu"]
    return full * rows * shape.vocabulary + states, gradient
