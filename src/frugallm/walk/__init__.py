"""The block-by-block pass that every post-training method uses."""
