"""What a run needs before it starts, and what it leaves in its folder."""
