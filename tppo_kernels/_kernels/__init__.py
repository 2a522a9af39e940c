"""What the fast backends share: memory, launches, pieces of Triton kernels."""
