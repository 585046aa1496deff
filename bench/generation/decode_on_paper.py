"""What a decode step costs on a GPU, on paper: each kernel's bytes, floor and expected time.

`python bench/generation/decode_on_paper.py` prints the tables of docs/performance.md, which a test compares with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

HALF, FLOAT = 2, 4
ATTENTION_TILE = 128  # positions of a split, csrc/cuda/attention.cu


@dataclass(frozen=True)
class Gpu:
    name: str
    bytes_per_second: float  # of its memory, as sold
    share: float  # of them, that a kernel which only reads is expected to reach
    launch: float  # seconds from one kernel of a CUDA graph to the next that waits for it, until data flows


# The assumptions; docs/performance.md says where they come from. None was measured.
H100 = Gpu("H100 SXM", 3.35e12, 0.9, 2.0e-6)


@dataclass(frozen=True)
class Decoder:
    name: str
    hidden: int
    layers: int
    query_heads: int
    key_value_heads: int
    head_size: int
    inner: int
    vocabulary: int


LLAMA_1B = Decoder("Llama-3.2-1B", 2048, 16, 32, 8, 64, 8192, 128256)
LLAMA_7B = Decoder("Llama-2-7B", 4096, 32, 32, 32, 128, 11008, 32000)


@dataclass(frozen=True)
class Kernel:
    name: str
    launches: int  # of a step
    bytes: float  # of a step
    extra: float = 0  # seconds of a step in which neither memory nor launches are what is waited for

    def floor(self, gpu: Gpu) -> float:
        return self.bytes / gpu.bytes_per_second

    def expected(self, gpu: Gpu) -> float:
        return self.launches * gpu.launch + self.bytes / (gpu.share * gpu.bytes_per_second) + self.extra


def kernels(model: Decoder, rows: int, position: int) -> Iterator[Kernel]:
    """The kernels of one step of `rows` sequences that stand at `position`, in bfloat16, without filters."""
    queries = model.query_heads * model.head_size
    keys_values = 2 * model.key_value_heads * model.head_size
    layers = model.layers

    def product(inputs: int, outputs: int, out_bytes: int = HALF) -> int:
        return HALF * inputs * outputs + rows * (HALF * inputs + out_bytes * outputs)

    splits = -(-(position + 1) // ATTENTION_TILE)
    partials = 2 * FLOAT * model.query_heads * splits * (model.head_size + 2)
    cached = HALF * keys_values * (position + 1)
    # Once for the tokens, once to take the rows that the head is to have.
    yield Kernel("embed", 2, 2 * 2 * HALF * rows * model.hidden)
    # Behind each half of a layer, with x, the residual read and written, and y; before the first, behind the last, and
    # the last norm, which leave something out.
    yield Kernel("add_norm", 2 * layers + 2, (4 * (2 * layers - 1) + 2 + 3 + 2) * HALF * rows * model.hidden)
    yield Kernel("linear_many: queries, keys, values", layers, layers * product(model.hidden, queries + keys_values))
    yield Kernel("rope_append", layers, layers * 2 * HALF * rows * (queries + keys_values))
    attended = rows * (cached + 2 * HALF * queries + partials)
    yield Kernel("attention, two passes", 2 * layers, layers * attended)
    yield Kernel("linear: attention's output", layers, layers * product(queries, model.hidden))
    yield Kernel("gated_mlp_in", layers, layers * product(model.hidden, 2 * model.inner))
    yield Kernel("linear: the MLP's output", layers, layers * product(model.inner, model.hidden))
    yield Kernel("linear: head", 1, product(model.hidden, model.vocabulary, FLOAT))
    # Twelve sums over a block, one after the other.
    yield Kernel("sample, two passes", 2, FLOAT * rows * model.vocabulary, extra=12 * 0.6e-6)


def table(model: Decoder, position: int, batches: tuple[int, ...], gpu: Gpu = H100) -> str:
    head = ["kernel", "launches"]
    for rows in batches:
        head += [f"batch {rows}: MB", "floor, us", "expected, us"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    steps = [list(kernels(model, rows, position)) for rows in batches]
    for i, kernel in enumerate(steps[0]):
        line = [kernel.name, str(kernel.launches)]
        for step in steps:
            of_batch = step[i]
            line += [
                f"{of_batch.bytes / 1e6:.1f}",
                f"{of_batch.floor(gpu) * 1e6:.1f}",
                f"{of_batch.expected(gpu) * 1e6:.0f}",
            ]
        lines.append(line)
    line = ["**a step**", str(sum(kernel.launches for kernel in steps[0]))]
    for step in steps:
        line += [
            f"{sum(kernel.bytes for kernel in step) / 1e6:.0f}",
            f"**{sum(kernel.floor(gpu) for kernel in step) * 1e6:.0f}**",
            f"**{sum(kernel.expected(gpu) for kernel in step) * 1e6:.0f}**",
        ]
    lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables() -> Iterator[str]:
    for model in (LLAMA_1B, LLAMA_7B):
        yield table(model, 1023, (1, 16))


if __name__ == "__main__":
    print("\n\n".join(tables()))
