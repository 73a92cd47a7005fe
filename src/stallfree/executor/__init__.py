"""Running batches: from chunks of requests to tensors, and back to sampled tokens."""
