"""Starting ranks, and what a process does that is one."""
