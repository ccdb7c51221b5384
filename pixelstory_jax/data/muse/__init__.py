"""Questions about several instances of a picture, written from annotations in the manner of MUSE."""
