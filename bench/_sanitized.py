"""A bare script for compute-sanitizer: every compiled kernel of the extension, small, once.

No test runner and no Triton: what the tool watches is what these calls launch.
"""

from __future__ import annotations

import torch
from _first_touch import COMPILED, DEVICE, calls
from _machine import generator, normal

import tppo_kernels as tk


def main() -> None:
    """Forward and backward at two sizes, tokens that fill no block among them."""
    backend = COMPILED
    with tk.use_backend(backend):
        for batch, tokens in ((3, 65), (64, 1000)):
            for make in calls(batch, tokens).values():
                make(batch)[0]()
    if DEVICE == "cuda":
        with tk.use_backend("cuda"):
            g = generator(DEVICE, 1)
            hidden, weight = normal(g, 33, 136).requires_grad_(), normal(g, 3, 136).requires_grad_()
            out = tk.token_head(hidden, weight, normal(g, 3))
            torch.autograd.grad(out.sum(), (hidden, weight))
        torch.cuda.synchronize()
    print(f"every kernel of {backend} ran")


if __name__ == "__main__":
    main()
