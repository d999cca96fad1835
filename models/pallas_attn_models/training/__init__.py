"""The training of the checkpoint that ships with the package."""

from pallas_attn_models.training.tasks import Batch as Batch
from pallas_attn_models.training.train import exact_answers as exact_answers
