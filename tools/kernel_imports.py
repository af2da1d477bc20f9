"""What `tools.kernels` has imported before it forks: libraries that most notebooks import."""

import os

# As a kernel sets it, before matplotlib is first imported.
os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"

import ipykernel.kernelapp  # noqa: F401
import IPython.core.completer  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import torch  # noqa: F401
from transformers import (  # noqa: F401
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
)
