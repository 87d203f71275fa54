"""Learnable token reduction in JAX and Flax."""
