"""Compares ``jax.nn.dot_product_attention`` and Flax's attention with ours on the same arguments."""
