"""What the OCI hook programs of hooks/ do; part of every start, so nothing heavy is imported."""
