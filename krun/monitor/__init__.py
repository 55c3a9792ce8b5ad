"""What runs a payload: km (a binary) or the built-in KVM monitor."""
