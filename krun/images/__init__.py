"""Images on the node before a container needs them; knows nothing of the runtime part."""
