"""On-policy distillation on Megatron-Core: one additive per-token term on top of any advantage estimator."""

__version__ = "0.1.0"
