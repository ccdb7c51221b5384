"""The one training loop: state, optimizer, sharding, checkpoints, metric writers. It knows no model."""
