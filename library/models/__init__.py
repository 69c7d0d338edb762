"""The networks themselves: tensors in, tensors out; sizes read from the tensors of the checkpoint."""
