"""Package metadata. Never imports torch: build isolation would install a second one.

Nothing is compiled here. The C++ extension is built at first use (rlhf_fast/build.py), against the torch that is
installed, so that `pip install -e .` takes seconds.
"""

from pathlib import Path

from setuptools import find_namespace_packages, setup

setup(
    name="rlhf_fast",
    version="0.1.0",
    description="A kernel-accelerated PPO engine for aligning language models from human feedback",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # kernels/ and csrc/ are reached through the links in rlhf_fast/, as namespace packages without an __init__.py:
    # from the root, `import kernels` must stay free for the package of that name that transformers looks for.
    packages=find_namespace_packages(include=["rlhf_fast", "rlhf_fast.*"]),
    package_data={"": ["*.cpp", "*.h", "*.cu", "*.cuh", "*.css", "*.js", "*.html", "py.typed"]},
    # Why each one: README, "Dependencies".
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "transformers>=5",
        "deepspeed>=0.19.8",
        "peft>=0.19",
        "pybind11",
        "ninja",
        "datasets>=4",
        "pyyaml",
        "requests",
        "tensorboard",
        "tqdm",
    ],
    extras_require={
        "demo": ["chatterbot-corpus", "vaderSentiment"],
        "smollm2": ["gguf", "accelerate", "vaderSentiment", "chatterbot-corpus"],
        "wandb": ["wandb"],
        "test": [
            "pytest",
            "pytest-benchmark",
            "matplotlib",  # the picture of the bench
            "pytest-xdist",
            "hypothesis",
            "setuptools>=70.1",  # tests/test_install.py makes a wheel without build isolation
            "ruff",
            "mypy",
            "nvidia-cuda-nvrtc",  # what CUDA builds of torch bring: tests/cuda/test_nvrtc.py
            "types-PyYAML",
            "types-psutil",
            "types-requests",
            "types-tqdm",
        ],
    },
    entry_points={"console_scripts": ["rlhf-fast=rlhf_fast.cli:main"]},
)
