"""The shipped checkpoint: a decoder with 0.8 million parameters that adds, reverses and recalls."""

from pathlib import Path

DIRECTORY = Path(__file__).parent
