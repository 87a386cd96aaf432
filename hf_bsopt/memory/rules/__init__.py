"""What CUDA does that meta tensors do not: kernels, autocast, workspaces. Front door: cuda_dispatch.py."""
