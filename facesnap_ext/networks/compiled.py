"""Run FFRNet with its transformer blocks compiled by torch.compile: faster, with residuals equal up to rounding.

Blocks are compiled one by one. All blocks of the same width share the compiled code, so that compiling takes seconds
instead of minutes. On a GPU this needs Triton and a C compiler. If compiling fails, FFRNet runs uncompiled, in that
call and all later ones.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from facesnap_ext.errors import reason_of
from facesnap_ext.networks.ffrnet import FFRNet, TransformerBlock

log = logging.getLogger("facesnap")
failure: str | None = None  # message for the user: why FFRNet runs uncompiled; None unless compiling failed


def run(ffrnet: FFRNet, *inputs: Any) -> list[Tensor]:
    """Call `FFRNet.forward` with compiled blocks.

    The compiled code is kept on the blocks for later calls, but their `forward` is only replaced during this call.

    Raises:
        torch.cuda.OutOfMemoryError: the GPU has too little memory. Errors raised by `forward` itself also propagate.
    """
    global failure
    if failure is not None:
        return ffrnet(*inputs)
    blocks: list[Any] = [module for module in ffrnet.modules() if isinstance(module, TransformerBlock)]
    try:
        for block in blocks:
            if not hasattr(block, "compiled_forward"):
                block.compiled_forward = torch.compile(block.forward)
            block.forward = block.compiled_forward
        return ffrnet(*inputs)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # Triton, C compilers and PyTorch each raise different exception types
        reason = reason_of(error, 200)
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
    residuals = ffrnet(*inputs)  # this call also fails if compiling was not the cause
    failure = f"FFRNet could not be compiled ({reason}) and runs uncompiled; turn off compiling in the settings."
    log.warning(failure)
    return residuals
