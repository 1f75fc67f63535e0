"""DeepSpeed and the optimiser."""
