"""The embedded pictures and the composer that turns them into annotated scenes."""
