"""From files to static-shaped batches."""
