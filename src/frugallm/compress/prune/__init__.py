"""Post-training pruning: which weights become zero."""
