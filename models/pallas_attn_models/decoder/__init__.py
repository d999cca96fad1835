"""Decoders in Flax NNX: configuration, layers, caches. Independent of Hugging Face's names."""

from pallas_attn_models.decoder.abstract import abstract_decoder as abstract_decoder
from pallas_attn_models.decoder.cached_decoder import CachedDecoder as CachedDecoder
from pallas_attn_models.decoder.config import MAX_LAYERS as MAX_LAYERS
from pallas_attn_models.decoder.config import DecoderConfig as DecoderConfig
from pallas_attn_models.decoder.config import ExpertsConfig as ExpertsConfig
from pallas_attn_models.decoder.config import LatentConfig as LatentConfig
from pallas_attn_models.decoder.config import LayerConfig as LayerConfig
from pallas_attn_models.decoder.config import LayerSizes as LayerSizes
from pallas_attn_models.decoder.decoder import FLOAT_DTYPES as FLOAT_DTYPES
from pallas_attn_models.decoder.decoder import Decoder as Decoder
from pallas_attn_models.decoder.decoder import DecoderOutput as DecoderOutput
from pallas_attn_models.decoder.decoder import check_dtype as check_dtype
from pallas_attn_models.decoder.decoder import check_implementation as check_implementation
from pallas_attn_models.decoder.layer_caches import LayerCaches as LayerCaches
from pallas_attn_models.decoder.layer_caches import init_caches as init_caches
from pallas_attn_models.decoder.layer_caches import whole_pages as whole_pages
from pallas_attn_models.decoder.layers import MLP as MLP
from pallas_attn_models.decoder.parameter_shapes import layer_shapes as layer_shapes
from pallas_attn_models.decoder.parameter_shapes import outer_shapes as outer_shapes
from pallas_attn_models.decoder.rope import ROPE_FIELDS as ROPE_FIELDS
from pallas_attn_models.decoder.rope import RopeConfig as RopeConfig
