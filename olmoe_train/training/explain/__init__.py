"""Which documents made up an optimizer step: their losses, gradients and routing."""
