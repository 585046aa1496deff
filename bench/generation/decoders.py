"""Who decodes in bench_decode.py: our Generator, transformers' generate, and other engines in processes of their own.

Each is given a model and a job, and then generates as often as it is asked to.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria

from bench.generation.write_gguf import write_gguf
from rlhf_fast.generation import Generator, SamplingParams

PEERS = Path(__file__).parents[2] / ".venv-peers"  # what `make bench-peers` makes

# (tokens of each row, greedy instead of sampled) -> the rows' tokens
Generate = Callable[[Sequence[int], bool], list[list[int]]]


@dataclass(frozen=True)
class Job:
    """n completions of each prompt. `stop_ids`: end a row where our Generator's sampling, by its seeds, meets one."""

    prompts: list[list[int]]
    n: int = 1
    stop_ids: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.prompts) * self.n

    @property
    def positions(self) -> int:
        return len(self.prompts[0])


@contextmanager
def with_generator(model: Any, job: Job, backend: Literal["cpp", "transformers"]) -> Iterator[Generate]:
    """Our Generator. Rows that are to end early do so at the job's stop tokens, whatever length is asked for."""
    generator = Generator(model, backend=backend, max_batch_size=job.rows)

    def generate(lengths: Sequence[int], greedy: bool) -> list[list[int]]:
        params = SamplingParams(
            n=job.n,
            temperature=0 if greedy else 1,
            max_tokens=max(lengths),
            stop_token_ids=None if greedy else job.stop_ids,
            ignore_eos=True,
        )
        rollout = generator.rollout(job.prompts, params, seeds=range(len(job.prompts)))
        return [tokens[mask].tolist() for tokens, mask in zip(rollout.tokens, rollout.mask, strict=True)]

    yield generate


class _Ends(StoppingCriteria):
    """Ends row i at ends[i] tokens, the prompt among them."""

    def __init__(self, ends: Tensor):
        self.ends = ends

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= self.ends


@contextmanager
def with_transformers(model: Any, job: Job) -> Iterator[Generate]:
    """model.generate and nothing else."""
    prompts = torch.tensor(job.prompts).repeat_interleave(job.n, dim=0)  # as its num_return_sequences does

    def generate(lengths: Sequence[int], greedy: bool) -> list[list[int]]:
        config = GenerationConfig(
            do_sample=not greedy,
            top_k=None if greedy else 0,  # 0: all of them
            max_new_tokens=max(lengths),
            pad_token_id=0,
        )
        ends = _Ends(job.positions + torch.tensor(lengths))
        with torch.no_grad():
            whole = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), generation_config=config, stopping_criteria=[ends]
            )
        rows = whole[:, job.positions :]
        return [row[:length].tolist() for row, length in zip(rows, lengths, strict=True)]

    yield generate


@contextmanager
def with_llama_cpp(model: Any, job: Job, positions: int, folder: Path) -> Iterator[Generate]:
    """llama.cpp on the same weights, from a file: rows of up to `positions` tokens, torch's number of threads."""
    file = folder / "model.gguf"
    write_gguf(model, file)
    options = ["--rows", job.rows, "--positions", positions, *(["--shared"] if job.n > 1 else [])]
    with _peer("llama_cpp_peer.py", file, options, job) as generate:
        yield generate


@contextmanager
def with_ctranslate2(model: Any, job: Job, folder: Path) -> Iterator[Generate]:
    """CTranslate2 on the same weights, from a file: a float32 Llama with a tied head, rows of one length, n = 1."""
    import numpy

    file, config = folder / "model.npz", model.config
    numpy.savez(file, **{name: weight.detach().numpy() for name, weight in model.named_parameters()})
    options = ["--heads", config.num_attention_heads, "--key_value_heads", config.num_key_value_heads]
    options += ["--epsilon", config.rms_norm_eps, "--theta", config.rope_parameters["rope_theta"]]
    with _peer("ctranslate2_peer.py", file, options, job) as generate:
        yield generate


@contextmanager
def _peer(script: str, file: Path, options: Sequence[Any], job: Job) -> Iterator[Generate]:
    """A script in the environment of `make bench-peers`, with the weights in `file`, torch's number of threads."""
    command = [PEERS / "bin/python", Path(__file__).with_name(script), file, "--threads", torch.get_num_threads()]
    process = subprocess.Popen(
        [str(part) for part in [*command, *options]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    questions, answers = process.stdin, process.stdout

    def generate(lengths: Sequence[int], greedy: bool) -> list[list[int]]:
        question = {"prompts": job.prompts, "n": job.n, "lengths": list(lengths), "greedy": greedy}
        print(json.dumps(question), file=questions, flush=True)
        answer = answers.readline()
        assert answer, f"{script} ended with status {process.wait()}"
        return json.loads(answer)

    try:
        yield generate
    finally:
        questions.close()
        process.wait()
        answers.close()
        file.unlink()
