"""Training a converted model against its dense base."""
