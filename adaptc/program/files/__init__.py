"""Programs as files: written in torch.export's format, read again, whole or by reference to their base."""
