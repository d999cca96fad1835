"""From prompt tokens to new tokens: sampling, stop conditions, speculation, compiled steps, scheduler."""

from pallas_attn_models.generation.generator import GenerationResult as GenerationResult
from pallas_attn_models.generation.generator import Generator as Generator
from pallas_attn_models.generation.generator import PromptScore as PromptScore
from pallas_attn_models.generation.generator import StreamEvent as StreamEvent
from pallas_attn_models.generation.requests import Completion as Completion
from pallas_attn_models.generation.requests import Handle as Handle
from pallas_attn_models.generation.requests import TopLogprobs as TopLogprobs
from pallas_attn_models.generation.sampling import Limits as Limits
from pallas_attn_models.generation.sampling import Sampling as Sampling
from pallas_attn_models.generation.sampling import stop_sequences as stop_sequences
from pallas_attn_models.generation.scheduler import QueueFull as QueueFull
from pallas_attn_models.generation.speculation import DraftModel as DraftModel
from pallas_attn_models.generation.speculation import PromptLookup as PromptLookup
from pallas_attn_models.generation.stats import GenerationStats as GenerationStats
from pallas_attn_models.generation.stopping import StopStrings as StopStrings
from pallas_attn_models.generation.validation import check_prompts as check_prompts
