"""FFRNet with its transformer blocks through torch.compile: the same residuals but for rounding, sooner where it works.

Block by block, since all blocks of one width share what is compiled, which then takes seconds and not minutes. On a GPU
it needs Triton and a C compiler. Where it fails FFRNet runs as it is, in that call and from then on.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from facesnap_ext.errors import reason_of
from facesnap_ext.networks.ffrnet import FFRNet, TransformerBlock

log = logging.getLogger("facesnap")
failure: str | None = None  # why FFRNet runs as it is, in a sentence


def run(ffrnet: FFRNet, *inputs: Any) -> list[Tensor]:
    """`FFRNet.forward`; what is compiled stays with the network, and acts in this call alone.

    Raises:
        torch.cuda.OutOfMemoryError: as without; and whatever `forward` itself raises.
    """
    global failure
    if failure is not None:
        return ffrnet(*inputs)
    blocks = [module for module in ffrnet.modules() if isinstance(module, TransformerBlock)]
    try:
        for block in blocks:
            if not hasattr(block, "compiled_forward"):
                block.compiled_forward = torch.compile(block.forward)
            block.forward = block.compiled_forward
        return ffrnet(*inputs)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # Triton, compilers and PyTorch's own layers each have theirs
        reason = reason_of(error, 200)
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
    residuals = ffrnet(*inputs)  # raises too where compiling is not to blame
    failure = f"FFRNet could not be compiled ({reason}) and runs as it is; turn compiling off in the settings."
    log.warning(failure)
    return residuals
