"""A plan at work: what ranks send each other, on real ranks or for all of them in one process."""
