"""``python -m pallas_attn_models.train``: trains the checkpoint that ships with the package."""

from pallas_attn_models.training.train import main

if __name__ == "__main__":
    main()
