"""CUDA behavior that meta tensors lack: kernels, autocast, workspaces. Start with cuda_dispatch.py."""
