"""Studies: experiments small enough to be exact, on the very losses that training uses."""
