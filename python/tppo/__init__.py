"""Token-level PPO (Ouyang et al., EMNLP 2025), stage by stage, over `tppo_kernels`."""
