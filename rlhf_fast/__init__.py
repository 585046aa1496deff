"""Alignment of language models from human feedback: SFT, reward model, PPO."""
