"""What a person touches: the command line, composing the config sections, submit and follow. Never imports torch."""
