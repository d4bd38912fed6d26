"""The life of a run: its checkpoints, how it resumes, and how it ends."""
