"""The inference engine: scheduler, paged cache, runner and sampler."""
