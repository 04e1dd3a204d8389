"""One job, one tensor, one result."""
