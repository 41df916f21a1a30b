"""Pretrain and fine-tune OLMoE mixture-of-experts models (arXiv 2409.02060)."""

__version__ = "0.1.0"
