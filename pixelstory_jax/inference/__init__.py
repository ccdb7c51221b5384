"""Generation, segmentation answers and the pictures that show them."""
