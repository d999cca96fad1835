"""Trains the checkpoint that ships with the package."""

from pallas_attn_models.training.tasks import END as END
from pallas_attn_models.training.tasks import Batch as Batch
from pallas_attn_models.training.tasks import Example as Example
from pallas_attn_models.training.tasks import held_out_prompts as held_out_prompts
