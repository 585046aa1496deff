"""The command line: `rlhf-fast COMMAND`. Thin: each command reads its arguments and calls one function.

Exit status: 0 done, 1 failed, 2 bad usage or configuration. Heavy imports wait until a command needs them, so that
`--help` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import errno
import gc
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from rlhf_fast.config import TrainerConfig
from rlhf_fast.errors import ConfigError, RLHFFastError

EPILOG = """
overrides are flat: rlhf-fast ppo --config ppo.yaml max_steps=100 learning_rate=2e-6
several GPUs or nodes: torchrun --nproc_per_node 8 -m rlhf_fast.cli ppo --config ppo.yaml zero_stage=2
"""

# Full, over the quota, over the limit of one file, read-only, broken.
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    set_environment()
    warnings.showwarning = _show_warning
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    # argparse takes the overrides of one place only; those after a later option come back as unknown.
    if hasattr(args, "overrides") and all("=" in word and not word.startswith("-") for word in rest):
        args.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return args.run(args) or 0
    except RLHFFastError as error:
        print(f"rlhf-fast {args.command}: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        if error.errno not in DISK_TROUBLE:
            raise
        file = f"{error.filename}: " if error.filename else ""
        then = ". Mend that, then --resume" if hasattr(args, "resume") else ""
        print(f"rlhf-fast {args.command}: {file}{error.strerror}{then}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"rlhf-fast {args.command}: interrupted", file=sys.stderr)
        return 130


def set_environment() -> None:
    """What libraries read when they load: to be called before torch is imported."""
    # Read by torch's CPU allocator when it loads: 2 MB pages for large tensors. A fresh [N, V] gradient otherwise
    # spends most of its time in page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Read by GNU OpenMP when it loads: threads that wait go to sleep soon. With the default, which spins for about a
    # millisecond, any other process on the machine slows small models down several times.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Models and data come from disk; a hub name is an error with a reason, not a time-out.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """The message alone: where in our code it arose is nothing a user can act on. Libraries' notes stay out."""
    if not issubclass(category, DeprecationWarning | FutureWarning):
        print(f"warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlhf-fast",
        description="Align language models: SFT, reward model, PPO.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher puts it before the command
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    for name, title in (
        ("sft", "fine-tune on prompts with completions, or on conversations"),
        ("reward", "train a reward model on preference pairs"),
        ("ppo", "align a model with a reward by PPO"),
    ):
        train = commands.add_parser(name, help=title, epilog=EPILOG, formatter_class=parser.formatter_class)
        _add_training_arguments(train)
        train.set_defaults(run=_train)

    pipeline = commands.add_parser("pipeline", help="run SFT, reward model and PPO one after the other")
    _add_training_arguments(pipeline)
    pipeline.set_defaults(run=_pipeline)

    generate = commands.add_parser("generate", help="complete prompts; one JSON object a line")
    generate.add_argument("--model", required=True, help="folder of a causal LM")
    generate.add_argument("--prompt", action="append", default=[], help="a prompt (may be repeated)")
    generate.add_argument("--prompts", type=Path, help="prompts as JSONL, Parquet or a datasets folder")
    generate.add_argument("overrides", nargs="*", metavar="key=value", help="sampling: temperature=0.7 max_tokens=64")
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="talk to a model; over a pipe one message a line")
    chat.add_argument("--model", required=True, help="folder of a causal LM")
    chat.add_argument("--system_prompt", metavar="TEXT")
    chat.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token (default: 0.7)")
    chat.add_argument("--top_p", type=float, default=0.95, help="default: 0.95")
    chat.add_argument("--max_new_tokens", type=int, default=256, help="of one answer (default: 256)")
    chat.add_argument("--seed", type=int, help="the same answers each time")
    chat.set_defaults(run=_chat)

    evaluate = commands.add_parser("eval", help="score a policy's completions of held-out prompts")
    evaluate.add_argument("--config", type=Path, required=True, help="a PPO config: its eval_data, reward, sampling")
    evaluate.add_argument("--model", help="folder of the policy (default: output_dir/final)")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value")
    evaluate.set_defaults(run=_evaluate)

    export = commands.add_parser("export", help="merge a model's adapters into a folder that needs no PEFT")
    export.add_argument("--model", required=True, help="folder of adapters, such as a LoRA run's final/")
    export.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="a new folder")
    export.set_defaults(run=_export)

    bench = commands.add_parser("bench", help="time the kernels against named peers (from a checkout)")
    bench.add_argument(
        "pytest_arguments",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="for pytest, after --: rlhf-fast bench -- -k forward",
    )
    bench.set_defaults(run=_bench)

    plan = commands.add_parser("plan", help="memory, traffic and time of PPO on GPUs that are not here, on paper")
    plan.add_argument("--model-size", required=True, metavar="SIZE", help="135m, 1b, 3b, 8b, 14b, 32b, 70b or 405b")
    plan.add_argument("--gpus", type=int, required=True, metavar="N", help="of all nodes together")
    plan.add_argument("--gpu", default="h100", metavar="KIND", help="a100-40gb, a100-80gb, h100, h200, b200 or l40s")
    plan.add_argument("--gpus-per-node", type=int, default=8, metavar="N")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="PPO's fields: batch_size=512 dtype=bfloat16")
    plan.set_defaults(run=_plan)

    doctor = commands.add_parser("doctor", help="say what is there, what is missing and what to do")
    doctor.set_defaults(run=_doctor)

    build = commands.add_parser("build", help="compile the extension now instead of at first use")
    build.add_argument("--cuda-arch", help="GPU architectures to build for, such as 80,90")
    build.set_defaults(run=_build)
    return parser


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, metavar="FILE.yaml")
    parser.add_argument("--output_dir", metavar="DIR", help="the run's folder (the same as output_dir=DIR)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the run's folder")
    parser.add_argument("--dry_run", action="store_true", help="print the memory plan and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def _train(args: argparse.Namespace) -> int:
    from rlhf_fast.config_loading import load_config
    from rlhf_fast.trainers import CONFIGS

    config: TrainerConfig = load_config(CONFIGS[args.command], args.config, args.overrides, output_dir=args.output_dir)
    _run_stage(args.command, config, resume=args.resume, dry_run=args.dry_run)
    return 0


def _run_stage(stage: str, config: TrainerConfig, *, resume: bool, dry_run: bool) -> bool:
    """Returns False when a signal ended the run before its last step."""
    from rlhf_fast.trainers import TRAINERS
    from rlhf_fast.trainers.run_folder import is_finished

    if dry_run:
        from rlhf_fast.plan import memory_plan

        plan = memory_plan(config)
        print(plan)
        plan.check()
        return True
    if resume and is_finished(config):
        print(f"{stage}: the run in {config.output_dir} is finished; nothing is left to do", file=sys.stderr)
        return True
    trainer = TRAINERS[stage](config, resume=resume)
    trainer.train()
    return trainer.run.finished


def _pipeline(args: argparse.Namespace) -> int:
    from rlhf_fast.trainers.pipeline import load_pipeline, planned

    stages = load_pipeline(args.config, args.overrides, output_dir=args.output_dir)
    for stage, config in planned(stages) if args.dry_run else stages:
        if not _run_stage(stage, config, resume=args.resume, dry_run=args.dry_run):
            break  # the next stage would start from what this one has not written yet
        gc.collect()  # a trainer and its engines refer to each other; the next stage needs their memory
    return 0


def _generate(args: argparse.Namespace) -> int:
    import torch

    from rlhf_fast.config_loading import parse_overrides
    from rlhf_fast.data import ChatFormat, load_rows
    from rlhf_fast.generation import Generator, SamplingParams
    from rlhf_fast.models import check_vocabulary, load_causal_lm, load_tokenizer

    try:
        params = SamplingParams(**parse_overrides(args.overrides, SamplingParams))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    prompts: list[Any] = list(args.prompt)
    if args.prompts:
        prompts += [row["prompt"] for row in load_rows(str(args.prompts), kind="prompt", on_bad_row="error")]
    if not prompts:
        raise ConfigError("nothing to complete: give --prompt TEXT or --prompts FILE.jsonl")
    tokenizer = load_tokenizer(args.model)
    chat = ChatFormat(tokenizer)
    params = replace(params, stop_token_ids=[*chat.stop_token_ids, *(params.stop_token_ids or [])])
    model = load_causal_lm(args.model, dtype="float32").to("cuda" if torch.cuda.is_available() else "cpu")
    check_vocabulary(model, tokenizer)
    try:
        completions = Generator(model, tokenizer).generate([chat.encode_prompt(prompt) for prompt in prompts], params)
    except ValueError as error:  # a prompt that is empty or too long
        raise ConfigError(str(error)) from None
    for i, completion in enumerate(completions):
        row = {
            "prompt": prompts[i // params.n],
            "completion": completion.text,
            "finish_reason": completion.finish_reason,
            "tokens": len(completion.token_ids),
            "logprob": sum(completion.logprobs),
        }
        print(json.dumps(row, ensure_ascii=False))
    return 0


def _chat(args: argparse.Namespace) -> int:
    import torch

    from rlhf_fast.chat import Conversation, chat
    from rlhf_fast.generation import Generator, SamplingParams
    from rlhf_fast.models import check_vocabulary, load_causal_lm, load_tokenizer

    try:
        params = SamplingParams(
            temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_new_tokens, seed=args.seed
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error).replace("max_tokens", "max_new_tokens")) from None
    tokenizer = load_tokenizer(args.model)
    model = load_causal_lm(args.model, dtype="float32").to("cuda" if torch.cuda.is_available() else "cpu")
    check_vocabulary(model, tokenizer)
    chat(Conversation(Generator(model, tokenizer), params, args.system_prompt))
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from rlhf_fast.config import PPOConfig
    from rlhf_fast.config_loading import load_config
    from rlhf_fast.distributed import init_distributed
    from rlhf_fast.trainers.evaluation import evaluate_policy

    config = load_config(PPOConfig, args.config, args.overrides)
    metrics = evaluate_policy(config, args.model or str(Path(config.output_dir) / "final"))
    if init_distributed().is_main:
        print(json.dumps(metrics, indent=1))
    return 0


def _export(args: argparse.Namespace) -> int:
    from rlhf_fast.models import export_merged

    export_merged(args.model, args.output_dir)
    print(args.output_dir)
    return 0


def _bench(args: argparse.Namespace) -> int:
    import subprocess

    folder = Path(__file__).resolve().parent.parent / "bench"
    if not folder.is_dir():
        raise ConfigError("bench/ is not part of the installed package: run this from a checkout (pip install -e .)")
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(folder),
        "--benchmark-enable",
        "--import-mode=importlib",  # files of one name lie in several folders
        "-s",
        *(x for x in args.pytest_arguments if x != "--"),
    ]
    return subprocess.call(command, cwd=folder.parent)


def _plan(args: argparse.Namespace) -> int:
    from rlhf_fast.scaling import plan_report

    print(plan_report(args.model_size, args.gpus, args.gpu, args.gpus_per_node, args.overrides))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from rlhf_fast.doctor import main as doctor

    return doctor()


def _build(args: argparse.Namespace) -> int:
    from rlhf_fast import build, build_cuda

    architectures = build_cuda.architectures(args.cuda_arch)
    for library in (build.ops_library(), build.generation_library()):
        build.announce(library)
    build.load_ops()
    build.load_generation()
    for architecture in architectures:
        build.announce(build_cuda.cuda_library(architecture), f"sm_{architecture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
