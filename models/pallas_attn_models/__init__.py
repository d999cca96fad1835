"""Flax decoders that attend with ``pallas_attn``, and what generates text with them."""

from pallas_attn_models.cached_decoder import CachedDecoder as CachedDecoder
from pallas_attn_models.checkpoint import load_hf as load_hf
from pallas_attn_models.checkpoint import save_hf as save_hf
from pallas_attn_models.config import DecoderConfig as DecoderConfig
from pallas_attn_models.config import RopeConfig as RopeConfig
from pallas_attn_models.decoder import Decoder as Decoder
from pallas_attn_models.decoder import DecoderOutput as DecoderOutput
from pallas_attn_models.generator import GenerationResult as GenerationResult
from pallas_attn_models.generator import GenerationStats as GenerationStats
from pallas_attn_models.generator import Generator as Generator
from pallas_attn_models.sampling import Sampling as Sampling
