"""Loads, checks and saves checkpoints in Hugging Face's format."""

from pallas_attn_models.checkpoints.contents import check_contents as check_contents
from pallas_attn_models.checkpoints.contents import read_config as read_config
from pallas_attn_models.checkpoints.files import CONFIG as CONFIG
from pallas_attn_models.checkpoints.files import OpenCheckpoint as OpenCheckpoint
from pallas_attn_models.checkpoints.files import writable_directory as writable_directory
from pallas_attn_models.checkpoints.hf import load_hf as load_hf
from pallas_attn_models.checkpoints.hf import save_hf as save_hf
from pallas_attn_models.checkpoints.hf_config import config_from_hf as config_from_hf
from pallas_attn_models.checkpoints.hf_config import config_to_hf as config_to_hf
from pallas_attn_models.checkpoints.hub import CHECKPOINT_FILES as CHECKPOINT_FILES
from pallas_attn_models.checkpoints.hub import local_directory as local_directory
from pallas_attn_models.checkpoints.hub import open_headers as open_headers
