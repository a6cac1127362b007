"""What is measured about generated views, one file a kind of metric, and the networks that metrics need."""
