"""The readable twins: every op in plain PyTorch, any dtype, any device, differentiable by autograd."""
