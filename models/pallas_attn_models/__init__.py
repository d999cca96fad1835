"""Flax decoders that attend with ``pallas_attn``, and text generation with them."""

from pallas_attn_models.checkpoints import load_hf as load_hf
from pallas_attn_models.checkpoints import save_hf as save_hf
from pallas_attn_models.decoder import CachedDecoder as CachedDecoder
from pallas_attn_models.decoder import Decoder as Decoder
from pallas_attn_models.decoder import DecoderConfig as DecoderConfig
from pallas_attn_models.decoder import DecoderOutput as DecoderOutput
from pallas_attn_models.decoder import RopeConfig as RopeConfig
from pallas_attn_models.generation import Completion as Completion
from pallas_attn_models.generation import DraftModel as DraftModel
from pallas_attn_models.generation import GenerationResult as GenerationResult
from pallas_attn_models.generation import GenerationStats as GenerationStats
from pallas_attn_models.generation import Generator as Generator
from pallas_attn_models.generation import Handle as Handle
from pallas_attn_models.generation import Limits as Limits
from pallas_attn_models.generation import PromptLookup as PromptLookup
from pallas_attn_models.generation import PromptScore as PromptScore
from pallas_attn_models.generation import QueueFull as QueueFull
from pallas_attn_models.generation import Sampling as Sampling
from pallas_attn_models.generation import StreamEvent as StreamEvent
