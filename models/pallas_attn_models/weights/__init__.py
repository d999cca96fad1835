"""The checkpoint that ships with the package: a decoder of 0.8 million parameters that adds numbers and copies text."""

from pathlib import Path

DIRECTORY = Path(__file__).parent
