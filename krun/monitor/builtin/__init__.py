"""krun's own KVM monitor: a payload's virtual machine, run by the process that it replaces."""
