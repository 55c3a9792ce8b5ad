"""The native engine's decisions: from a configuration to a Plan of plain data; pure."""
