"""``jax.nn.dot_product_attention`` and Flax's attention against ours: the same results for the same arguments."""
