"""PixelStory-JAX: PixelLM (text and masks) and StoryDiffusion (consistent characters) in JAX/Flax."""

__version__ = "0.1.0"
