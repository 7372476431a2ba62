"""Checkpoints in and out: HuggingFace's config and safetensors, and the files that TEAL's authors published.

config = converters.read_config("Mistral-7B-v0.1")
params = converters.read_params("Mistral-7B-v0.1", config, dtype="bfloat16")
converters.export_checkpoint(params, config, "copy")
histograms = converters.teal_published.read_histograms("models/Mistral-7B")
"""

from converters import teal_published as teal_published
from converters.export import export_checkpoint as export_checkpoint
from converters.grouped import GroupedWeight as GroupedWeight
from converters.hf_config import config_from_hf as config_from_hf
from converters.hf_config import config_to_hf as config_to_hf
from converters.hf_config import read_config as read_config
from converters.hf_config import read_gates as read_gates
from converters.hf_config import read_quantization as read_quantization
from converters.keys import TensorKey as TensorKey
from converters.keys import tensor_keys as tensor_keys
from converters.quantization_config import Quantization as Quantization
from converters.reader import ProgressBar as ProgressBar
from converters.reader import read_params as read_params
from converters.regroup import RegroupedWeight as RegroupedWeight
from converters.regroup import regroup_int4 as regroup_int4
from converters.regroup import regroup_int8 as regroup_int8

__all__ = [
    "GroupedWeight",
    "ProgressBar",
    "Quantization",
    "RegroupedWeight",
    "TensorKey",
    "config_from_hf",
    "config_to_hf",
    "export_checkpoint",
    "read_config",
    "read_gates",
    "read_params",
    "read_quantization",
    "regroup_int4",
    "regroup_int8",
    "teal_published",
    "tensor_keys",
]
