"""The networks of the method, one definition each, in plain torch with the names of the LDM checkpoints."""

from .autoencoder import LATENT_SCALE, AutoencoderKL
from .config import AutoencoderConfig, NetworkConfig, UNetConfig
from .cross_view_attention import CrossViewAttention
from .layers import set_checkpointing
from .novel_view import NovelViewConfig, NovelViewModel
from .reference_encoder import ReferenceEncoder, join_references
from .registry import NETWORKS, NetworkSpec, title_of
from .unet import UNet
from .view_controlnet import ViewControlNet
