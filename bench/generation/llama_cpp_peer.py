"""llama.cpp as a decoder: a request in each line of input, the tokens of its rows as a line of output, in JSON.

A script for the environment of `make bench-peers`, which has llama-cpp-python and not torch; decoders.py starts it.
The cache is float32, each row samples with llama.cpp's own chain (temperature 1, then a draw), rows that have their
tokens leave the batch, and a prompt of several rows is computed once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from typing import Any

import llama_cpp

FLOAT32, ERROR = 0, 4  # ggml's numbers for the type and for the level of a message


@llama_cpp.llama_log_callback
def print_errors(level: int, text: bytes, data: Any) -> None:
    if level == ERROR:
        print(text.decode(), end="", file=sys.stderr)


class Decoder:
    """`rows` sequences of up to `positions` tokens. `shared`: of common prompts, which then lie in the cache once."""

    def __init__(self, file: str, rows: int, positions: int, threads: int, shared: bool):
        model_params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), model_params)
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max, params.kv_unified = rows, shared
        params.n_ctx = rows * -(-positions // 256) * 256  # it wants multiples
        params.n_batch = rows * positions
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = FLOAT32
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(rows * positions, 0, 1)

    def generate(self, prompts: list[list[int]], n: int, lengths: list[int], greedy: bool) -> list[list[int]]:
        """Row i*n + j is sample j of prompt i."""
        llama_cpp.llama_memory_clear(self.memory, True)
        samplers = [self._sampler(row, greedy) for row in range(len(lengths))]
        tokens: list[list[int]] = [[] for _ in lengths]
        self._forward(
            (token, position, i * n, position == len(prompt) - 1)
            for i, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        )
        output = 0
        for i, prompt in enumerate(prompts):
            output += len(prompt)
            for row in range(i * n, i * n + n):
                tokens[row].append(llama_cpp.llama_sampler_sample(samplers[row], self.context, output - 1))
                if row != i * n:
                    llama_cpp.llama_memory_seq_cp(self.memory, i * n, row, 0, len(prompt))
        while going := [row for row, length in enumerate(lengths) if len(tokens[row]) < length]:
            self._forward((tokens[row][-1], len(prompts[row // n]) + len(tokens[row]) - 1, row, True) for row in going)
            for output, row in enumerate(going):
                tokens[row].append(llama_cpp.llama_sampler_sample(samplers[row], self.context, output))
        for sampler in samplers:
            llama_cpp.llama_sampler_free(sampler)
        return tokens

    def _forward(self, inputs: Iterable[tuple[int, int, int, bool]]) -> None:
        """`inputs`: token, position, row, and whether logits are wanted."""
        batch, count = self.batch, 0
        for token, position, row, logits in inputs:
            batch.token[count], batch.pos[count], batch.logits[count] = token, position, logits
            batch.n_seq_id[count], batch.seq_id[count][0] = 1, row
            count += 1
        batch.n_tokens = count
        status = llama_cpp.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode: status {status}")

    def _sampler(self, seed: int, greedy: bool) -> Any:
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        parts = (
            [llama_cpp.llama_sampler_init_greedy()]
            if greedy
            else [llama_cpp.llama_sampler_init_temp(1.0), llama_cpp.llama_sampler_init_dist(seed)]
        )
        for part in parts:
            llama_cpp.llama_sampler_chain_add(chain, part)
        return chain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    for name in ("rows", "positions", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--shared", action="store_true")
    arguments = parser.parse_args()
    llama_cpp.llama_log_set(print_errors, None)
    decoder = Decoder(**vars(arguments))
    for line in sys.stdin:
        print(json.dumps(decoder.generate(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
