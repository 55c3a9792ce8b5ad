"""One verb a file: run(call) -> int is the exit status."""
