"""bitpalette: a weight and KV-cache quantization compiler. Importing it registers its checkpoints with transformers."""

from . import hf as hf
from ._version import __version__ as __version__
from .api import compile_checkpoint, generate, load, quantize_linear, quantize_model, save_pretrained
from .calibrate.plan import Plan, Rule
from .calibrate.text import Calibration
from .kernels.linear import QuantLinear
from .kv_cache import QuantizedCache
from .quant.scheme import Scheme, SchemeError
from .quant.solver import quantize_tensor
from .quant.stats import Stats
from .quant.tensor import QuantizedTensor

__all__ = [
    "Calibration",
    "Plan",
    "QuantLinear",
    "QuantizedCache",
    "QuantizedTensor",
    "Rule",
    "Scheme",
    "SchemeError",
    "Stats",
    "__version__",
    "compile_checkpoint",
    "generate",
    "load",
    "quantize_linear",
    "quantize_model",
    "quantize_tensor",
    "save_pretrained",
]
