"""Runs a Program on ``torch.distributed`` or on threads, exactly as it is written."""
