"""From command-line words and experiment files to a checked `Experiment`."""
