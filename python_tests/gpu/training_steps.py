"""One training step of a layer for each case, for a profiler: `python -m python_tests.gpu.training_steps SECONDS`.

Cases that would begin after so many seconds are left out, and named.
"""

import sys
import time
from itertools import product

import torch

from cbn_ext import CompoundBatchNorm2d, use_backend

SHAPES = ((64, 256, 56, 56), (64, 64, 56, 56))
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def main(seconds: float, device: str = "cuda") -> None:
    """Run all cases for which there is time."""
    end = time.monotonic() + seconds
    for shape, dtype, layout in product(SHAPES, DTYPES, LAYOUTS):
        late = time.monotonic() > end
        print("x".join(map(str, shape)), dtype, layout, "left out, the time was over" if late else "", flush=True)
        if late:
            continue
        layer = CompoundBatchNorm2d(shape[1], device=device)
        x, grad = (torch.randn(shape, device=device, dtype=dtype).to(memory_format=layout) for _ in range(2))
        x.requires_grad_()
        with use_backend("native"):
            torch.autograd.grad(layer(x), (x, *layer.parameters()), grad)
        if device == "cuda":
            torch.cuda.synchronize()


if __name__ == "__main__":
    main(float(sys.argv[1]))
