"""Text to tokens and back: tokenizers, chat templates, ``generation_config.json``."""

from pallas_attn_models.text.chat_template import ChatTemplate as ChatTemplate
from pallas_attn_models.text.detokenizer import Detokenizer as Detokenizer
from pallas_attn_models.text.generation_config import GenerationDefaults as GenerationDefaults
from pallas_attn_models.text.tokenizer import encode as encode
from pallas_attn_models.text.tokenizer import load_tokenizer as load_tokenizer
from pallas_attn_models.text.tokenizer_config import TOKENIZER as TOKENIZER
