"""Flax decoders that attend with ``pallas_attn``, and what generates text with them."""

from pallas_attn_models.cached_decoder import CachedDecoder as CachedDecoder
from pallas_attn_models.checkpoint import load_hf as load_hf
from pallas_attn_models.checkpoint import save_hf as save_hf
from pallas_attn_models.config import DecoderConfig as DecoderConfig
from pallas_attn_models.config import RopeConfig as RopeConfig
from pallas_attn_models.decoder import Decoder as Decoder
from pallas_attn_models.decoder import DecoderOutput as DecoderOutput
from pallas_attn_models.generator import GenerationResult as GenerationResult
from pallas_attn_models.generator import Generator as Generator
from pallas_attn_models.generator import PromptScore as PromptScore
from pallas_attn_models.generator import StreamEvent as StreamEvent
from pallas_attn_models.requests import Completion as Completion
from pallas_attn_models.requests import Handle as Handle
from pallas_attn_models.sampling import Limits as Limits
from pallas_attn_models.sampling import Sampling as Sampling
from pallas_attn_models.scheduler import QueueFull as QueueFull
from pallas_attn_models.speculation import DraftModel as DraftModel
from pallas_attn_models.speculation import PromptLookup as PromptLookup
from pallas_attn_models.stats import GenerationStats as GenerationStats
